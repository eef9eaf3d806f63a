"""`upit-merge demo`: from text on this machine to a measured mixture of experts."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import yaml
from rich.table import Table

from upit_merge.commands import compare
from upit_merge.commands.preview import dense_models
from upit_merge.config.recipe import Recipe, parse_recipe
from upit_merge.config.router import RouterSettings
from upit_merge.demo.corpus import Domain, load_domains, write_texts
from upit_merge.demo.foretell import STEPS_AROUND, foretold_time
from upit_merge.demo.progress import open_demo
from upit_merge.demo.training import DemoModels, TrainingBudget, train_demo_models
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError, argument
from upit_merge.io.hub import OpenOptions
from upit_merge.io.text_file import read_record, write_json, write_unless_there
from upit_merge.merge.inputs import opened
from upit_merge.models.gates import training_free_gates
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.report.next_steps import only_steps, tell_next
from upit_merge.report.tables import best_in_bold, show
from upit_merge.router.evaluation import Groups, dense_bytes, disk_bytes, run_mixture
from upit_merge.router.pretrain import load_seed_set
from upit_merge.router.rivals import dense_rivals
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Kind, Rival, Worth
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.parallel import progress_bar

RECIPE = """\
# What `upit-merge demo` runs: checkpoints of a small Llama, fine-tuned on three kinds of text one
# after the other, become 8 experts; the router learns from text of all three kinds.
#
#   upit-merge demo demo/                       (makes the models and the data, then runs this)
#   cd demo && mergekit-yaml demo.yml again/    (runs it once more)
merge_method: upit
base_model: ./base
models:
  - model: ./sft/checkpoint-*
dtype: float32
parameters:
  num_experts: 8
  experts_per_token: 2
router:
  data: ./seed.jsonl
"""

_SEED_SAMPLES_PER_DOMAIN = 200
_MEASURED_TOKENS = 128  # of a held-out document
_RANDOM_GATES = 3


@dataclass(frozen=True)
class Row:
    """A model's held-out perplexity per domain."""

    model: str
    perplexities: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric mean over the domains: exp of the mean of their losses."""
        return geometric_mean(self.perplexities)


def run_demo(
    folder: Path, *, seed: int = 0, quiet: bool = False, budget: TrainingBudget | None = None
) -> None:
    """Train small models, merge them with `mergekit-yaml`, and print a table of what came out.

    Args:
        folder: Receives `base/`, `sft/checkpoint-*/`, `seed.jsonl`, `demo.yml`, `moe/` and
            `results.json`; must be empty, not exist, or hold what an earlier call of the same seed
            and budget has done, which goes on.
        seed: Of initial weights, the order of training data, the seed samples and the merge.
        budget: Sizes and lengths of the training; the default if not given.

    Raises:
        UpitError: the folder is not empty, or a step failed.
    """
    progress = open_demo(folder, seed=seed, budget=vars(budget or TrainingBudget()))
    results = folder / "results.json"
    with ends_at_once(
        lambda: "Interrupted; the same command goes on from the last model that was saved."
    ):
        if results.is_file() and (folder / "moe" / "config.json").is_file():
            print("This demo is finished; nothing was computed.")
            _tell(folder, read_record(results))
            return
        started = time.perf_counter()
        _silence_transformers()
        if not quiet:
            written = progress.training().get("written", [])
            told = foretold_time(budget or TrainingBudget(), written, STEPS_AROUND)
            print(told, flush=True)

        domains = load_domains()
        models = train_demo_models(
            folder, domains, seed=seed, budget=budget, quiet=quiet, progress=progress
        )
        write_texts(folder / "seed.jsonl", domains, _seed_texts(domains, seed))
        write_texts(folder / "held-out.jsonl", domains, [domain.heldout for domain in domains])
        write_unless_there(folder / "demo.yml", RECIPE)
        with only_steps():
            _merge(folder, seed, quiet=quiet)
        rows, worth = _measure(folder, models, domains, quiet=quiet)

        found = {
            "domains": [domain.name for domain in domains],
            "rows": [{"model": r.model, "perplexities": r.perplexities} for r in rows],
            "verdict": worth.verdict(),
        }
        write_json(results, found)
        progress.forget_training()
    print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.")
    _tell(folder, found)


def _tell(folder: Path, results: Mapping[str, Any]) -> None:
    """Print what came out, and what to do with it."""
    rows = [Row(row["model"], tuple(row["perplexities"])) for row in results["rows"]]
    show(_table(rows, results["domains"]))
    if verdict := results.get("verdict"):  # earlier versions had none
        print(verdict)
    print(f"The model is in {folder / 'moe'}.")
    moe, data = argument(folder / "moe"), argument(folder / "held-out.jsonl")
    tell_next(
        (
            "see which expert reads what",
            f"upit-merge inspect {moe} --data {data} --group-by domain --html routing.html",
        ),
        ("let it write", f'upit-merge chat {moe} --show-experts --prompt "def main"'),
        ("begin with models of your own", "upit-merge init FOLDER"),
    )


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _seed_texts(domains: Sequence[Domain], seed: int) -> list[list[str]]:
    """Draw training text of every domain, in equal shares; the held-out text stays out."""
    generator = random.Random(seed)
    return [
        generator.sample(domain.train, min(_SEED_SAMPLES_PER_DOMAIN, len(domain.train)))
        for domain in domains
    ]


def _merge(folder: Path, seed: int, *, quiet: bool) -> None:
    """Run the recipe as a user would, with stock mergekit."""
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "demo.yml", "moe"]
    command += ["--random-seed", str(seed), *(["--quiet"] if quiet else [])]
    print(f"In {folder}: mergekit-yaml " + " ".join(command[3:]), flush=True)
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise UpitError(f"mergekit-yaml failed in {folder}; see its message above.")


def _measure(
    folder: Path, models: DemoModels, domains: Sequence[Domain], *, quiet: bool
) -> tuple[list[Row], Worth]:
    """Measure every model on the held-out text, as `upit-merge evaluate --against` does."""
    mixture = folder / "moe"
    total = len(models.checkpoints) + 4 + _RANDOM_GATES
    with (
        tempfile.TemporaryDirectory() as temporary,
        opened_mixture(mixture) as moe,
        opened(_recipe(models), OpenOptions()) as inputs,
        progress_bar(total, "held-out perplexity", quiet=quiet, unit="model") as bar,
    ):
        scratch = Path(temporary)
        held_out = str(folder / "held-out.jsonl")
        settings = RouterSettings(data=held_out, max_length=_MEASURED_TOKENS)
        model = LayerwiseMixture(moe, torch.device("cpu"))
        seeds = load_seed_set(
            settings,
            load_tokenizer(mixture),
            context=_MEASURED_TOKENS,
            vocab_size=model.vocab_size,
            seed=0,
            column="domain",
        )
        stage = RouterStage(model, seeds, settings, 0, scratch, quiet=True)
        sums = run_mixture(stage)[0]
        bar.update()
        rivals = []
        for number, path in enumerate([models.base, *models.checkpoints]):
            other = compare.Rival(path.name, str(path))
            own = compare.rival_losses(other, stage, mixture, OpenOptions())
            kind: Kind = "single" if number else "base"
            rivals.append(Rival(kind, path.name, own, {"checkpoint": number - 1}))
            bar.update()
        blends = dense_rivals(dense_models(inputs), stage, None)
        blends = [rival for rival in blends if rival.kind != "base"]
        bar.update(2)
        # Those that a recipe without `router:` gets.
        random_sums = []
        for seed in range(_RANDOM_GATES):
            gates = training_free_gates(
                moe, model.format, model.mixture_layers, model.num_experts, seed
            )
            random_sums.append(run_mixture(stage, gates)[0])
            bar.update()
        random_gates = Rival("random", "random gates", torch.stack(random_sums).mean(0))
        worth = Worth.of(
            sums,
            torch.tensor([s.num_targets for s in seeds.samples], dtype=torch.float64),
            [*rivals, *blends, random_gates],
            Groups.of(seeds.samples).kinds,
            bytes_ours=disk_bytes(model)[0],
            bytes_dense=dense_bytes(model),
            ours_kind="mixture",
        )

        def row(name: str, rival: Rival | None = None) -> Row:
            values = [worth.perplexity(rival, domain.name) for domain in domains]
            return Row(name, tuple(math.nan if v is None else v for v in values))

        rows = [row(rival.name, rival) for rival in rivals]
        names = {"average": "average of checkpoints"}
        rows += [row(names.get(rival.kind, rival.name), rival) for rival in blends]
        random_row = row(f"MoE, random gate (mean of {_RANDOM_GATES})", random_gates)
        return [*rows, random_row, row("MoE as built")], worth


def _recipe(models: DemoModels) -> Recipe:
    """Return the demo's recipe with the models where they are, without its router."""
    document = yaml.safe_load(RECIPE)
    del document["router"]
    document["base_model"] = str(models.base)
    document["models"] = [{"model": str(path)} for path in models.checkpoints]
    return parse_recipe(document)


def _table(rows: Sequence[Row], domains: Sequence[str]) -> Table:
    table = Table(title="Held-out perplexity (lower is better)", title_justify="left")
    table.add_column("model")
    for domain in domains:
        table.add_column(domain, justify="right")
    table.add_column("mean", justify="right")
    values = [(*row.perplexities, row.mean) for row in rows]
    for row, cells in zip(rows, best_in_bold(values, ".2f"), strict=True):
        table.add_row(row.model, *cells)
    return table
