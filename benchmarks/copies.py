"""Do clusters for gates help copies? Sparse upcycling with random and with k-means gates, trained alike.

python -m benchmarks.copies --folder FOLDER [--seeds 0 1] [--repeats 2] [--steps 100] [--json FILE]

FOLDER receives a small dense model per seed (or has it). Of it recipes/sparse-upcycling.yml makes
8 copies, top-2, with random gates and with objective: kmeans on 600 samples of three kinds of text;
`upit-merge finetune` trains each on the same text, in the same order; a repeat is other gates and
another order. Held-out perplexity is the geometric mean of the three kinds.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.router_models import SEED_SAMPLES, SPECIALISED
from benchmarks.shared_experts import packed_texts, perplexity
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.demo.corpus import load_domains, write_texts
from upit_merge.demo.training import train_demo_models
from upit_merge.training.finetune import finetune

RECIPE = Path(__file__).parents[1] / "recipes" / "sparse-upcycling.yml"
HELD_OUT = 24  # rows of 128 tokens, per kind of text
DOCUMENTS = 960  # per kind of text
GATES: dict[str, dict[str, Any] | None] = {"random": None, "kmeans": {"objective": "kmeans"}}
TRAINING = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "router_aux_loss_coef": 0.01,
    "per_device_train_batch_size": 8,
    "max_length": 64,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "steps",
}


def prepare(folder: Path, seed: int) -> None:
    """Train the dense model and write the texts, unless they are there."""
    domains = load_domains()
    if not (folder / "base" / "config.json").is_file():
        train_demo_models(folder, domains, seed=seed, budget=replace(SPECIALISED, sft_rounds=0))
    chosen = random.Random(seed)
    texts = [chosen.sample(d.train, DOCUMENTS) for d in domains]
    write_texts(folder / "train.jsonl", domains, texts)
    write_texts(folder / "seed.jsonl", domains, [t[:SEED_SAMPLES] for t in texts])


def upcycled(folder: Path, seed: int, gates: str) -> Path:
    """Run the recipe; returns the mixture."""
    out = folder / f"moe-{gates}-{seed}"
    if (out / "config.json").is_file():
        return out
    document = yaml.safe_load(RECIPE.read_text())
    document["base_model"] = str(folder / "base")
    document["models"] = [{"model": str(folder / "base")}]
    document["dtype"] = "float32"
    document["parameters"]["seed"] = seed
    document.pop("router", None)
    if (router := GATES[gates]) is not None:
        document["router"] = {"data": str(folder / "seed.jsonl"), **router}
    run_recipe(parse_recipe(document), yaml.safe_dump(document), out, RunOptions(quiet=True))
    return out


def trained(model: Path, folder: Path, seed: int, steps: int) -> Path:
    """Train a model on the folder's text; returns where it is."""
    out = model.parent / f"{model.name}-trained"
    config = model.parent / f"{model.name}.yml"
    document = {
        "model_name_or_path": str(model),
        "data": str(folder / "train.jsonl"),
        "output_dir": str(out),
        "max_steps": steps,
        "save_steps": steps,
        "seed": seed,
        **TRAINING,
    }
    config.write_text(yaml.safe_dump(document))
    finetune(config, quiet=True)
    return out


def held_out(model: Path, texts: dict[str, torch.Tensor]) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return perplexity(loaded.eval(), {name: rows[:HELD_OUT] for name, rows in texts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for repeat, seed in product(range(arguments.repeats), arguments.seeds):
        folder = arguments.folder / f"copies-{seed}"
        prepare(folder, seed)
        texts = packed_texts(folder, "heldout")
        row: dict[str, Any] = {"model": seed, "repeat": repeat}
        row["dense"] = held_out(folder / "base", texts)
        for gates in GATES:
            out = trained(upcycled(folder, repeat, gates), folder, repeat, arguments.steps)
            row[gates] = held_out(out, texts)
        rows.append(row)
        told = {name: f"{row[name]:.3f}" for name in ("dense", *GATES)}
        print(f"model {seed}, repeat {repeat}: {told}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
