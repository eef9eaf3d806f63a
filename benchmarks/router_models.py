"""Models for benchmarks/router.py: checkpoints that specialised, or that did not, and their MoE.

As in the demo, but with a wider and deeper model that is trained longer; see
`upit_merge/demo/training.py` for what makes checkpoints specialise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers.utils import logging

from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.demo.corpus import Domain, load_domains
from upit_merge.demo.training import TrainingBudget, train_demo_models

SPECIALISED = TrainingBudget(hidden_size=192, layers=4, base_steps=900, sft_steps=200)
# Every visit draws from all three domains alike.
WELL_MIXED = TrainingBudget(replay=2 / 3)
NUM_EXPERTS = 8
SEED_SAMPLES = 200  # of every domain


def build(folder: Path, seed: int, *, mixed: bool) -> None:
    """Train a base and its checkpoints, and merge them; leaves a folder that is there alone.

    Args:
        folder: Receives `base/`, `sft/`, `moe/` (with random gates), `seed.jsonl` and
            `held-out.jsonl`, both with the column `domain`.
    """
    if (folder / "moe" / "config.json").is_file():
        return
    logging.disable_progress_bar()
    domains = load_domains()
    train_demo_models(folder, domains, seed=seed, budget=WELL_MIXED if mixed else SPECIALISED)
    generator = random.Random(seed)
    _write(folder / "seed.jsonl", domains, lambda d: generator.sample(d.train, SEED_SAMPLES))
    _write(folder / "held-out.jsonl", domains, lambda d: d.heldout)
    document = {
        "merge_method": "upit",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "sft" / "checkpoint-*")}],
        "dtype": "float32",
        "parameters": {"num_experts": NUM_EXPERTS, "seed": seed},
    }
    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, folder / "moe", RunOptions(quiet=True))


def merged(
    folder: Path, checkpoints: Sequence[Path], out: Path, parameters: dict, **router
) -> Path:
    """Merge some checkpoints of a folder from `build`, with a router; returns the output."""
    document = {
        "merge_method": "upit",
        "base_model": str(folder / "base"),
        "models": [{"model": str(path)} for path in checkpoints],
        "dtype": "float32",
        "parameters": parameters,
        "router": {"data": str(folder / "seed.jsonl"), **router},
    }
    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, out, RunOptions(quiet=True))
    return out


def _write(path: Path, domains: list[Domain], texts) -> None:
    with path.open("w", encoding="utf-8") as file:
        for domain in domains:
            for text in texts(domain):
                file.write(json.dumps({"text": text, "domain": domain.name}) + "\n")
