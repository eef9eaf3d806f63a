"""How well do gates of a few prompts per expert route? Objectives beside each other.

python -m benchmarks.prompts --folder FOLDER [--seeds 0 1] [--draws 5] [--lines 5] [--json FILE]

FOLDER receives the specialised models of benchmarks/router_models.py (or has them). Their last
three checkpoints, one for each kind of text, become 3 experts, top-2; their gates are
fitted to a few single lines of each kind's training text. `accuracy` is the share of held-out
tokens whose first choice is the expert of their kind, the mean over layers; perplexity is the
geometric mean of the three kinds. `600 samples` has whole documents of each kind in the lines' place.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.router_models import build, merged
from benchmarks.shared_experts import packed_texts
from upit_merge.commands.options import MixtureOptions
from upit_merge.commands.router import train_router
from upit_merge.config.router import RouterSettings
from upit_merge.demo.corpus import load_domains

OBJECTIVES = ("hidden", "one_vs_rest", "softmax", "ridge")
ROWS = 16  # of held-out text, per kind


def lines_of(texts: Sequence[str], count: int, draw: int) -> list[str]:
    """Draw single lines of some length, as somebody would write them."""
    generator = random.Random(draw)
    found: list[str] = []
    while len(found) < count:
        lines = [line.strip() for line in generator.choice(texts).splitlines()]
        lines = [line for line in lines if 15 <= len(line) <= 120]
        found += [generator.choice(lines)] if lines else []
    return found


@torch.no_grad()
def measure(out: Path, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the accuracy of the first choice, and the held-out perplexity, top-2."""
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    right, losses = [], []
    for expert, rows in enumerate(texts.values()):
        few = rows[:ROWS]
        output = model(input_ids=few, output_router_logits=True)
        logits = output.router_logits
        right += [float((layer.argmax(-1) == expert).float().mean()) for layer in logits]
        losses.append(
            float(F.cross_entropy(output.logits[:, :-1].flatten(0, 1), few[:, 1:].flatten()))
        )
    return {"accuracy": mean(right), "perplexity": math.exp(mean(losses))}


def measured(
    folder: Path, out: Path, draws: int, lines: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Fit the gates of one mixture in every way; yields what is found of each."""
    texts, domains = packed_texts(folder, "heldout"), load_domains()
    column = {"column": "domain", "experts": {name: number for number, name in enumerate(texts)}}
    steps = sorted((folder / "sft").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    data = str(folder / "seed.jsonl")
    if not (out / "config.json").is_file():
        merged(folder, steps[-3:], out, {}, objective="random")
    ways: list[tuple[str, dict[str, Any]]] = [
        ("600 samples, one_vs_rest", {"data": data, "assign": column}),
        ("random", {"data": data, "objective": "random"}),
    ]
    for draw in range(draws):
        prompts = {i: lines_of(d.train, lines, draw) for i, d in enumerate(domains)}
        ways += [(name, {"prompts": prompts, "objective": name}) for name in OBJECTIVES]
    for name, settings in ways:
        train_router(out, RouterSettings(**settings), MixtureOptions(quiet=True))
        yield name, measure(out, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--lines", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="Where the mixtures go; FOLDER if not given.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        folder = arguments.folder / f"specialised-{seed}"
        build(folder, seed, mixed=False)
        out = (arguments.scratch or arguments.folder) / f"prompts-{seed}"
        for name, row in measured(folder, out, arguments.draws, arguments.lines):
            found.setdefault(name, []).append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    print("| gates | accuracy | worst | perplexity | worst |\n|---|---|---|---|---|")
    for name, rows in found.items():
        right = [row["accuracy"] for row in rows]
        losses = [row["perplexity"] for row in rows]
        print(
            f"| {name} | {mean(right):.1%} | {min(right):.1%} | {geometric_mean(losses):.2f} | "
            f"{max(losses):.2f} |"
        )


if __name__ == "__main__":
    main()
