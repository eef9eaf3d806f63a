"""Held-out perplexity of the demo's MoE under gates fitted in different ways.

upit-merge demo demo/
python benchmarks/gates.py demo/ [MORE DEMO FOLDERS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from upit_merge.demo.corpus import load_domains
from upit_merge.demo.evaluation import perplexity, set_gates
from upit_merge.recipe import RouterSettings
from upit_merge.router.buckets import ASSIGNMENTS
from upit_merge.router.gate_files import opened_moe
from upit_merge.router.layerwise import LayerwiseMoe
from upit_merge.router.pretrain import (
    Buckets,
    fit_gates,
    load_seed_set,
    sort_into_buckets,
    training_free_gates,
)
from upit_merge.tokenizer import load_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "default (one_vs_rest, balanced, mean)": {},
    "stream: expert": {"stream": "expert"},
    "objective: ridge": {"objective": "ridge"},
    "assign: lowest": {"assign": "lowest"},
    "temperature: 0.5": {"temperature": 0.5},
    "temperature: 2": {"temperature": 2.0},
}
RANDOM_GATES = 3


def measure(folder: Path) -> dict[str, float]:
    """Geometric mean over the demo's domains of the perplexity, by variant."""
    tokenizer = load_tokenizer(folder / "moe")
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    domains = load_domains()
    results: dict[str, float] = {}

    def evaluate(gates: list[torch.Tensor]) -> float:
        set_gates(model, gates)
        return geometric_mean(perplexity(model, tokenizer, d.heldout) for d in domains)

    with opened_moe(folder / "moe") as moe, tempfile.TemporaryDirectory() as scratch:
        layerwise = LayerwiseMoe(moe, torch.device("cpu"))
        plain = RouterSettings(data=str(folder / "seed.jsonl"))
        seeds = load_seed_set(
            plain, tokenizer, context=layerwise.context, vocab_size=layerwise.vocab_size, seed=0
        )
        started = time.perf_counter()
        losses = sort_into_buckets(layerwise, seeds, plain, Path(scratch), quiet=False).losses
        print(f"{folder}: losses of all experts in {time.perf_counter() - started:.1f} s")
        for name, changes in VARIANTS.items():
            settings = plain.model_copy(update=changes)
            buckets = Buckets(losses, ASSIGNMENTS[settings.assign](losses))
            started = time.perf_counter()
            gates = fit_gates(layerwise, seeds, buckets, settings, Path(scratch), quiet=True)
            seconds = time.perf_counter() - started
            results[name] = evaluate(gates)
            print(f"{folder}: {name}: {results[name]:.2f} (fitted in {seconds:.1f} s)", flush=True)
        random = [
            evaluate(training_free_gates(moe, layerwise.num_layers, layerwise.num_experts, seed))
            for seed in range(RANDOM_GATES)
        ]
        name = f"objective: random (mean of {RANDOM_GATES})"
        results[name] = geometric_mean(random)
    return results


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    logging.disable_progress_bar()
    folders = [Path(argument) for argument in sys.argv[1:]]
    columns = [measure(folder) for folder in folders]
    print("| gates | " + " | ".join(folder.name for folder in folders) + " |")
    print("|---" * (len(folders) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
