"""The fine-tuning of benchmarks.real that leaves checkpoints, from one base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.text import CONTEXT, KINDS, load_rows
from benchmarks.real.training import (
    ROWS,
    Schedule,
    adamw,
    in_batches,
    load,
    train,
    write,
)

STEPS = 48  # of every kind of text, in all stages but the unfinished one: 49,152 tokens
RATE = 2e-4
STAGE_ROWS = STEPS * ROWS  # of every kind
VISITS = 2  # of every kind, where the data arrives in order
REPLAY = 0.2  # share of a visit's rows that are of the other kinds
QUARTERS = 4  # checkpoints of the well-mixed run
UNFINISHED_STEPS, UNFINISHED_RATE = 16, 5e-4
UNFINISHED_ROWS, UNFINISHED_CONTEXT = 5, 64  # of a step: 320 tokens


@dataclass(frozen=True)
class Stage:
    """One run of fine-tuning.

    Attributes:
        name: Also of its folder, but for a specialist.
        kind: Of a specialist's text, by number.
    """

    name: str
    kind: int | None = None

    def needs(self) -> list[Stage]:
        return []

    def checkpoints(self, folder: Path, seed: int) -> list[Path]:
        """Where its checkpoints go, in order."""
        if self.kind is not None:
            return [folder / f"seed-{seed}" / "specialists" / f"checkpoint-{1 + self.kind}"]
        count = {IN_ORDER.name: VISITS * len(KINDS), MIXED.name: QUARTERS}.get(
            self.name, len(KINDS)
        )
        own = folder / f"seed-{seed}" / self.name.replace(" ", "-")
        return [own / f"checkpoint-{number}" for number in range(1, 1 + count)]


SPECIALISTS = [Stage(f"specialist {name}", kind) for kind, name in enumerate(KINDS)]
UNFINISHED, IN_ORDER, MIXED = Stage("unfinished"), Stage("in order"), Stage("mixed")
STAGES = [*SPECIALISTS, UNFINISHED, MIXED, IN_ORDER]


def train_stage(folder: Path, stage: Stage, seed: int) -> dict[str, Any]:
    """Train it; all but the unfinished one see the same rows of a seed, in orders of their own."""
    torch.manual_seed(seed)
    drawn = load_rows(folder).drawn(seed, 0, STAGE_ROWS)
    outs = stage.checkpoints(folder, seed)
    base = folder / "base"
    outs[0].parent.mkdir(parents=True, exist_ok=True)
    if stage.kind is not None:
        model = load(base)
        seconds = train(model, in_batches([drawn[stage.kind]], seed), Schedule(RATE))
        write(model, base, outs[0])
    elif stage == UNFINISHED:
        seconds = _unfinished(base, drawn, outs)
    elif stage == MIXED:
        model, batches = load(base), in_batches(drawn, seed)
        every = len(batches) // QUARTERS

        def after_step(step: int) -> None:
            if step % every == 0:
                write(model, base, outs[step // every - 1])

        seconds = train(model, batches, Schedule(RATE), after_step=after_step)
    else:
        seconds = _in_order(base, drawn, outs, seed)
    return {"training": seconds}


def _unfinished(base: Path, drawn: list[Tensor], outs: list[Path]) -> float:
    """A few noisy steps on every kind, each from the base."""
    seconds = 0.0
    for of_kind, out in zip(drawn, outs, strict=True):
        short = of_kind.reshape(-1, UNFINISHED_CONTEXT)[:: CONTEXT // UNFINISHED_CONTEXT]
        batches = list(short[: UNFINISHED_STEPS * UNFINISHED_ROWS].split(UNFINISHED_ROWS))
        model = load(base)
        seconds += train(model, batches, Schedule(UNFINISHED_RATE))
        write(model, base, out)
    return seconds


def _in_order(base: Path, drawn: list[Tensor], outs: list[Path], seed: int) -> float:
    """One kind after the other, twice round; every visit is a cycle of the rate."""
    model = load(base)
    optimizer, seconds = adamw(model), 0.0
    for visit, out in enumerate(outs):
        rows = visited(drawn, visit % len(KINDS), visit // len(KINDS))
        batches = in_batches([rows], 100 * seed + visit)
        seconds += train(model, batches, Schedule(RATE), optimizer)
        write(model, base, out)
    return seconds


def visited(drawn: list[Tensor], kind: int, turn: int) -> Tensor:
    """Return the rows of one visit; all visits together see every row once."""
    size = len(drawn[kind]) // VISITS
    away = round(REPLAY * size / (len(drawn) - 1))
    own = size - away * (len(drawn) - 1)
    parts = []
    for other, rows in enumerate(drawn):
        part = rows[turn * size : (turn + 1) * size]
        place = (kind - other) % len(drawn)  # 0 for its own visit, then the others in turn
        start = 0 if place == 0 else own + (place - 1) * away
        parts.append(part[start : start + (own if place == 0 else away)])
    return torch.cat(parts)
