"""Does an always-on expert help? Half of every FFN shared, beside plain experts of equal work.

python -m benchmarks.shared_experts --folder FOLDER [--kinds specialised mixed] [--seeds 0 1]

FOLDER receives the models of benchmarks/router_models.py (or has them). Of their checkpoints
mixtures of 8 experts are made, whose routers are pre-trained alike; the tables show perplexity on
held-out text (geometric mean of three kinds) before any further training, and after STEPS steps of
AdamW on training text of all kinds, the same text for each.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.router_models import build, merged
from upit_merge.demo.corpus import load_domains
from upit_merge.demo.training import TrainingBudget, learning_rate_cycle, pack, sequences
from upit_merge.models.tokenizer import load_tokenizer

STEPS, RATE, BATCH = 80, 3e-4, 8
# What the mixture is, and how many dense FFNs a token meets in it.
VARIANTS: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "plain experts, 2 of 8 (Mixtral)": (2, {}, {"experts_per_token": 2}),
    "plain experts, 2 of 8, sigmoid router": (
        2,
        {"architecture": "glm4_moe"},
        {"experts_per_token": 2},
    ),
    **{
        f"split, {of} shared, {k} of 8 halves": (
            (1 + k) / 2,
            {"architecture": "glm4_moe"},
            {"experts_per_token": k, "shared": "split", "shared_from": of},
        )
        for of, k in (("average", 3), ("average", 2), ("last", 3))
    },
}


def packed_texts(folder: Path, split: str) -> dict[str, torch.Tensor]:
    """Token rows by kind of text, (rows, context)."""
    tokenizer, context = load_tokenizer(folder / "base"), TrainingBudget().context
    return {d.name: pack(tokenizer, getattr(d, split), context) for d in load_domains()}


@torch.no_grad()
def perplexity(model: Any, texts: dict[str, torch.Tensor]) -> float:
    means = []
    for rows in texts.values():
        losses = [float(model(input_ids=part, labels=part).loss) for part in rows[:96].split(32)]
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


def mixed_batches(texts: dict[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Batches of all kinds of text in turn."""
    generator = torch.Generator().manual_seed(seed)
    streams = [sequences(rows, generator) for rows in texts.values()]
    while True:
        yield torch.stack([next(streams[index % len(streams)]) for index in range(BATCH)])


def train(model: Any, texts: dict[str, torch.Tensor], seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step, batch in zip(range(STEPS), mixed_batches(texts, seed), strict=False):
        optimizer.param_groups[0]["lr"] = RATE * learning_rate_cycle(step, STEPS)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    found = {}
    training, held_out = packed_texts(folder, "train"), packed_texts(folder, "heldout")
    checkpoints = sorted((folder / "sft").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    for name, (active, recipe, parameters) in VARIANTS.items():
        out = folder / "shared" / name.replace(" ", "-").replace(",", "")
        if not (out / "config.json").is_file():
            merged(folder, checkpoints, out, {"num_experts": 8, **parameters}, recipe=recipe)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model.eval()
        before = perplexity(model, held_out)
        train(model.train(), training, seed)
        after = perplexity(model.eval(), held_out)
        found[name] = {"active": active, "before": before, "after": after}
        print(f"{folder.name}: {name}: {active:g} FFNs, {before:.3f}, {after:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["specialised", "mixed"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for kind in arguments.kinds:
        for seed in arguments.seeds:
            folder = arguments.folder / f"{kind}-{seed}"
            build(folder, seed, mixed=kind == "mixed")
            results[folder.name] = measure(folder, seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    print("\n| models | mixture | FFNs per token | merged | trained further |")
    print("|---|---|---|---|---|")
    for name, rows in results.items():
        for variant, row in rows.items():
            print(
                f"| {name} | {variant} | {row['active']:g} | {row['before']:.2f} | "
                f"{row['after']:.2f} |"
            )


if __name__ == "__main__":
    main()
