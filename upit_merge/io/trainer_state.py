"""`trainer_state.json`, as transformers' Trainer and TRL leave it beside a checkpoint or an adapter.

It is only a hint, and may be anybody's: whatever is missing or of the wrong kind is passed over, and
a file that cannot be read costs a note, never a merge.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.io.untrusted import read_json

LOG = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
# Steps that no run takes; more digits would only fill the terminal.
_MOST_STEPS = 10**12


@dataclass(frozen=True)
class TrainerState:
    """Holds what a trainer noted about the learning rate until it saved a checkpoint.

    Attributes:
        step: At which it was saved; None if the file does not say.
        last_step: At which the run was to end; None if the file does not say.
        rates: The learning rates that were logged until then, as (step, rate), in order of steps.
    """

    step: int | None
    last_step: int | None
    rates: tuple[tuple[int, float], ...]

    @property
    def is_at_end(self) -> bool:
        """Return whether the run has taken all of its steps."""
        return self.step is not None and self.last_step is not None and self.step >= self.last_step

    def continues(self, earlier: TrainerState) -> bool:
        """Return whether this was saved later in what may be the same run, by the rates."""
        return bool(earlier.rates) and self.rates[: len(earlier.rates)] == earlier.rates


def read_trainer_state(label: str, folder: Path) -> TrainerState | None:
    """Read what a trainer left beside a checkpoint; None if nothing, or nothing that can be read.

    Args:
        label: What the checkpoint is called, for the note.
    """
    path = folder / TRAINER_STATE
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        content = read_json(path, f"checkpoint {label}")
    except (UpitError, OSError) as error:
        reason = error.message if isinstance(error, UpitError) else f"{path}: {error.strerror}."
        LOG.info("What the trainer noted of checkpoint %s is passed over. %s", label, reason)
        return None
    step = _step(content.get("global_step"))
    history = content.get("log_history")
    rates: dict[int, float] = {}
    for entry in history if isinstance(history, list) else ():
        if not isinstance(entry, dict):
            continue
        at, rate = _step(entry.get("step")), _rate(entry.get("learning_rate"))
        # A run that was resumed logs some steps twice; the later value is of what was saved.
        if at is not None and rate is not None and (step is None or at <= step):
            rates[at] = rate
    last = _step(content.get("max_steps"))
    return TrainerState(step, last or None, tuple(sorted(rates.items())))


def _step(value: Any) -> int | None:
    """Return a number of steps; None for whatever cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # JSON of Python has numbers that are none, and integers of any length.
    if not 0 <= value <= _MOST_STEPS or value != int(value):
        return None
    return int(value)


def _rate(value: Any) -> float | None:
    """Return a learning rate, which some callbacks log as text; None for whatever cannot be one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1e6 and math.isfinite(value) else None
