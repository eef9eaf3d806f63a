"""`upit-merge demo --all-stages`: a pipeline from a small dense model to a trained mixture."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from upit_merge.demo.corpus import load_domains, write_texts
from upit_merge.demo.foretell import STEPS_OF_PIPELINE, foretold_time
from upit_merge.demo.progress import open_demo
from upit_merge.demo.training import TrainingBudget, train_demo_models
from upit_merge.errors import UpitError
from upit_merge.io.text_file import write_unless_there
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.training.settings import check_trl

PIPELINE = """\
# What `upit-merge demo --all-stages` runs: a small Llama is fine-tuned on three kinds of text, one
# after the other, twice; its checkpoints become 8 experts; and the mixture is trained on the same
# text, mixed. Beside it the last checkpoint, on the same tokens.
#
#   upit-merge demo --all-stages demo/              (makes the model and the data, then runs this)
#   cd demo && upit-merge pipeline pipeline.yml     (goes on with it, or shows what is done)
base_model: ./base
output: ./run
data: ./train.jsonl               # kind after kind
prepare:
  num_train_epochs: 2
  save_steps: 0.16666             # a checkpoint after every kind
  train_sampling_strategy: sequential
  learning_rate: 5.0e-3
  lr_scheduler_type: cosine_with_restarts   # every checkpoint is at the end of a cycle
  lr_scheduler_kwargs: {num_cycles: 6}
  train_modules: ffn              # what becomes experts; attention and embeddings are the base's
  per_device_train_batch_size: 8
  max_length: 128
  activation_checkpointing: false
merge:
  dtype: float32
  parameters: {num_experts: 8, experts_per_token: 2}
router:
  data: ./seed.jsonl
post_train:
  num_train_epochs: 2
  learning_rate: 2.0e-3
  lr_scheduler_type: cosine
  router_aux_loss_coef: 0.01
  per_device_train_batch_size: 8
  max_length: 128
  activation_checkpointing: false
baseline: true
evaluate:
  data: ./held-out.jsonl
  group_by: domain
"""

_DOCUMENTS = 960  # per kind of text and epoch
_SEED_SAMPLES = 200  # per kind of text


def run_all_stages(
    folder: Path, *, seed: int = 0, quiet: bool = False, budget: TrainingBudget | None = None
) -> None:
    """Make a base model and text, and run a pipeline on them.

    Args:
        folder: Receives `base/`, `train.jsonl`, `seed.jsonl`, `held-out.jsonl`, `pipeline.yml` and
            `run/`; must be empty, not exist, or hold what an earlier call of the same seed and
            budget has done, which goes on.
        seed: Of everything random.
        budget: Of the base model's training.

    Raises:
        UpitError: the folder is not empty, TRL is missing, or a stage failed.
    """
    check_trl()
    budget_told = vars(budget or TrainingBudget())
    progress = open_demo(folder, seed=seed, budget=budget_told, stages="all")
    base_only = replace(budget or TrainingBudget(), sft_rounds=0)
    if not (quiet or (folder / "run").exists()):  # the pipeline's stages say what is done of it
        written = progress.training().get("written", [])
        print(foretold_time(base_only, written, STEPS_OF_PIPELINE), flush=True)
    domains = load_domains()
    with ends_at_once(
        lambda: "Interrupted; the same command goes on from the last model that was saved."
    ):
        train_demo_models(
            folder, domains, seed=seed, budget=base_only, quiet=quiet, progress=progress
        )
    generator = random.Random(seed)
    documents = [d.train[:_DOCUMENTS] for d in domains]
    write_texts(folder / "train.jsonl", domains, documents)
    samples = [generator.sample(texts, min(_SEED_SAMPLES, len(texts))) for texts in documents]
    write_texts(folder / "seed.jsonl", domains, samples)
    write_texts(folder / "held-out.jsonl", domains, [d.heldout for d in domains])
    text = PIPELINE if not seed else f"{PIPELINE}seed: {seed}\n"
    write_unless_there(folder / "pipeline.yml", text)
    command = [sys.executable, "-m", "upit_merge", "pipeline", "pipeline.yml"]
    print("$ upit-merge pipeline pipeline.yml", flush=True)
    command += ["--quiet"] if quiet else []
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise UpitError(
            "The pipeline ended early; see what it said above, then give the same command again, "
            "which goes on from there."
        )
