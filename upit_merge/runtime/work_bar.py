"""A progress bar in the user's units, such as samples, that moves with the work done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class WorkBar(tqdm):
    """Shows how many of `units` are done, were they done one after another.

    A stage goes over all its samples again and again, at different costs: the bar stands at the
    share of the work that is done, counted in units. The time left follows from the mean speed so
    far, for the stage's parts differ and the last seconds are no guide.

    Args:
        units: Samples, steps or experts.
        work: All there is to do, in whatever measure `advance` is given; parts of different cost
            have different weights in it.
        description: Stands before the bar.
        quiet: No bar.
        unit: What the units are called.
    """

    def __init__(
        self, units: int, work: float, description: str, *, quiet: bool, unit: str = "sample"
    ) -> None:
        self._units, self._work = units, max(work, 1e-9)
        self._done = self._skipped = 0.0
        self._started = time.monotonic()
        super().__init__(
            total=units,
            desc=description,
            disable=quiet,
            unit=unit,
            dynamic_ncols=True,
            # A log file keeps every line that a terminal overwrites.
            mininterval=0.5 if sys.stderr.isatty() else 2,
            miniters=0,
            smoothing=0,
        )

    @property
    def share(self) -> float:
        """Share of the work that is done, 0 … 1."""
        return min(self._done / self._work, 1.0)

    @property
    def seconds_left(self) -> float | None:
        """Time left at the mean speed so far; None before anything is done."""
        done = self._done - self._skipped
        if done <= 0:
            return None
        elapsed = time.monotonic() - self._started
        return elapsed * max(self._work - self._done, 0.0) / done

    def advance(self, work: float) -> None:
        """Count work that was done just now."""
        self._done += work
        self._move()

    def skip(self, work: float) -> None:
        """Count work that an earlier run has done: it says nothing of the speed."""
        self._skipped += work
        self.advance(work)

    def part(self, weight: float) -> Callable[[float], None]:
        """Return `advance` for a part of the work in which each piece costs `weight`."""
        return lambda pieces: self.advance(weight * pieces)

    def expect(self, work: float) -> None:
        """Add to the work there is to do; less than nothing if some of it turned out needless."""
        self._work = max(self._work + work, self._done, 1e-9)
        self._move()

    def finish(self) -> None:
        """Count everything as done: what is left turned out needless."""
        self.expect(self._done - self._work)

    def _move(self) -> None:
        self.update(self.share * self._units - self.n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what is printed: whole units, and the speed that `seconds_left` is based on."""
        shown: dict[str, Any] = dict(super().format_dict)
        left = self.seconds_left
        units_left = (1 - self.share) * self._units
        # Of many small summands the last digits are lost.
        shown["n"] = int(self.n + 1e-6)
        shown["elapsed"] = time.monotonic() - self._started
        shown["rate"] = units_left / left if left else None
        return shown
