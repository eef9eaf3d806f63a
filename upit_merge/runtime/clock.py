"""How long the parts of a job take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Clock:
    """Measures the wall time of named parts.

    Attributes:
        seconds: Of every part so far; what is entered again adds up.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that is spent inside to that of a part, unless it ends in an error."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[part] = round(self.seconds.get(part, 0.0) + spent, 3)
