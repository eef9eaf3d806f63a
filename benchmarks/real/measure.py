"""What benchmarks.real measures: models before post-training, and after it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.paper.measures import parameters
from benchmarks.real.arms import EXPERTS, SEEDS, Arm, Situation
from benchmarks.real.recipes import merged, random_gates
from benchmarks.real.stages import STAGE_ROWS
from benchmarks.real.text import Rows, load_rows, write_samples
from benchmarks.real.training import Schedule, in_batches, load, losses, train
from upit_merge.output.staging import REPORT
from upit_merge.training.trainable import routers

SEED_SAMPLES = 32  # of every kind, for the router: 96 in all
# Scales of the sum of the deltas; the first makes the average.
SCALES = {f"sum {scale:.2g}": scale for scale in (1 / EXPERTS, 0.5, 0.7, 1.0)}
AVERAGE = next(iter(SCALES))
DEFAULTS = 1.0, 2  # temperature and experts per token
POST_ROWS = 261  # of every kind: 100,224 tokens
CURVE = (0.05, 0.1, 0.25, 0.5)  # of post-training

Losses = dict[str, list[float]]


def measured(model: PreTrainedModel, rows: Rows, *parts: str) -> Losses:
    """Return mean losses by kind, nats per token, on some rows; on test and validation by default."""
    return {part: losses(model, getattr(rows, part)) for part in parts or ("test", "validation")}


# ---- before post-training


def look_at(folder: Path, situation: Situation, seed: int) -> dict[str, Any]:
    """Measure everything that can be made of a situation's checkpoints without training.

    On the test rows; dense models on the validation rows, too, by which the best of them is chosen.
    The mixture's temperature and experts per token are what `upit-merge` chose on its seed samples.
    """
    rows, base = load_rows(folder), folder / "base"
    checkpoints = situation.checkpoints(folder, seed)
    found: dict[str, Losses] = {"base": measured(load(base), rows)}
    for number, checkpoint in enumerate(checkpoints, 1):
        found[f"checkpoint {number}"] = measured(load(checkpoint), rows)
    for name, scale in SCALES.items():
        found[name] = measured(blend(base, checkpoints, scale), rows)
    moe, choice = mixture_of(folder, situation, seed)
    model = load(moe)
    with_temperature(model, 1 / choice["temperature"])
    own = choice["temperature"], choice["experts_per_token"]
    for temperature, count in {own, DEFAULTS}:
        with_temperature(model, temperature)
        with_experts_per_token(model, count)
        found[setting(temperature, count)] = measured(model, rows, "test")
        with_temperature(model, 1 / temperature)
    with_experts_per_token(model, 2)
    set_gates(model, random_gates(moe, seed))
    found["random gates"] = measured(model, rows, "test")
    return {"losses": found, "chosen": choice, "parameters": parameters(model)}


def setting(temperature: float, count: int) -> str:
    return f"temperature {temperature:g}, top-{count}"


def mixture_of(folder: Path, situation: Situation, seed: int) -> tuple[Path, dict[str, Any]]:
    """Make a situation's mixture unless it is there; returns it and what was chosen for it."""
    base, name = folder / "base", situation.name.replace(" ", "-")
    own = folder / f"seed-{seed}"
    samples = own / f"seed-samples-{name}.jsonl"
    if not samples.is_file():  # another time of change would be another run
        rows = load_rows(folder).drawn(seed, 0, STAGE_ROWS)
        write_samples(samples, AutoTokenizer.from_pretrained(base), rows, SEED_SAMPLES)
    checkpoints = situation.checkpoints(folder, seed)
    out = merged(base, checkpoints, own / f"moe-{name}", seed, samples)
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return out, report["router"]["chosen"]


def blend(base: Path, checkpoints: Sequence[Path], scale: float) -> PreTrainedModel:
    """The base plus so much of the sum of the deltas, rounded as a merge would write it."""
    model, others = load(base), [load(checkpoint).state_dict() for checkpoint in checkpoints]
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if ".mlp." in name:  # nothing else was trained
                delta = sum((other[name] - weight for other in others), torch.zeros_like(weight))
                weight.add_(delta, alpha=scale).copy_(weight.bfloat16())
    return model


@torch.no_grad()
def with_temperature(model: PreTrainedModel, temperature: float) -> None:
    for router in routers(model):
        router.weight.div_(temperature)


def with_experts_per_token(model: PreTrainedModel, count: int) -> None:
    model.config.num_experts_per_tok = count
    for router in routers(model):
        router.top_k = count


@torch.no_grad()
def set_gates(model: PreTrainedModel, gates: Sequence[Tensor]) -> None:
    for router, gate in zip(routers(model), gates, strict=True):
        router.weight.copy_(gate)


def best_of(found: dict[str, Losses], *prefixes: str) -> str:
    """Return the name that begins so and is best on the validation rows."""
    names = [name for name in found if name.startswith(prefixes)]
    return min(names, key=lambda name: mean(found[name]["validation"]))


# ---- after it


def post_train(
    folder: Path, arm: Arm, rate: float, seed: int, before: dict[str, Any]
) -> dict[str, Any]:
    """Train an arm on the seed's rows, in an order that all arms share, and measure it."""
    torch.manual_seed(seed)
    rows, looked = load_rows(folder), before["losses"]
    model = started(folder, arm, seed, looked)
    batches = in_batches(rows.drawn(seed, STAGE_ROWS, POST_ROWS), seed)
    is_first = seed == SEEDS[0]  # whose validation rows choose the rates, and make the curves
    points = {math.ceil(share * len(batches)): share for share in CURVE if is_first}
    curve = []

    def look(step: int) -> None:
        if step in points:
            curve.append((points[step], measured(model, rows, "validation")["validation"]))

    schedule = replace(Schedule(rate), **arm.training)
    seconds = train(model, batches, schedule, after_step=look)
    return {
        "losses": measured(model, rows, "test", *(["validation"] if is_first else [])),
        "curve": curve,
        "training": seconds,
        "tokens": sum(batch.numel() for batch in batches),
        "parameters": parameters(model),
    }


def started(folder: Path, arm: Arm, seed: int, looked: dict[str, Losses]) -> PreTrainedModel:
    """The model that an arm trains."""
    base, checkpoints = folder / "base", arm.situation.checkpoints(folder, seed)
    if arm.start == "last":
        return load(checkpoints[-1])
    if arm.start == "merge":
        return blend(base, checkpoints, SCALES[best_of(looked, "sum ")])
    if arm.start == "copies":
        out = folder / f"seed-{seed}" / "copies"
        return load(merged(base, checkpoints[-1:], out, seed, None))
    moe, _choice = mixture_of(folder, arm.situation, seed)
    model = load(moe)
    with_experts_per_token(model, 2)  # as all that is trained further here
    if arm.start == "random gates":
        set_gates(model, random_gates(moe, seed))
    return model
