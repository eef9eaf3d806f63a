"""How much disk a training run will take, known before it begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from upit_merge.io.disk import check_space

_ADAM_BYTES = 8  # two float32 moments for every trained weight


def check_training_space(
    trainer: Any, source: Path, out: Path, limit: int | None, *, keep_checkpoints: bool
) -> None:
    """Refuse a run whose checkpoints, and result, cannot fit the disk.

    Args:
        trainer: Set up, not yet trained.
        source: The model that is trained, as large as the result, however it is quantised in
            memory.
        out: Receives everything; what an earlier call has left there counts as free.
        limit: Keep so many checkpoints.
        keep_checkpoints: As for `RunState.finish`; a mixture is written besides.

    Raises:
        ResumableError: naming what is needed and what is free.
    """
    weights = list(trainer.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    is_adapter = hasattr(trainer.model, "peft_config")
    saved = sum(weight.nbytes for weight in (trained if is_adapter else weights))
    whole = sum(weight.nbytes for weight in weights)
    if any(getattr(trainer.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    count = _checkpoints(trainer, limit)
    # The newest is written before the oldest of too many is removed.
    present = count if keep_checkpoints else min(count, 2)
    needed = present * saved + min(count, 2) * _ADAM_BYTES * sum(w.numel() for w in trained)
    needed += 0 if keep_checkpoints else whole
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_space(out, max(0, needed - written), f"up to {present} checkpoints of the training")


def _checkpoints(trainer: Any, limit: int | None) -> int:
    """Return how many there are at most at a time, as far as the settings tell."""
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(len(trainer.train_dataset) / batch) * args.num_train_epochs)
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    count = math.ceil(steps / every)
    return min(count, limit + 1) if limit else count
