"""What of the samples is spent on which dense model, where there is no time for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Samples that a scale is chosen on: a parabola needs few.
_FEWEST_FOR_SCALE, _MOST_FOR_SCALE = 4, 12
# Shares of what may be spent: for the scale, for random gates.
_FOR_SCALE, _FOR_RANDOM = 0.3, 0.15
# Samples through random gates; with fewer there would be nothing to see, with more no verdict yet.
_RANDOM = 8
# A second checkpoint is measured as itself if as many samples as this are left for each.
_FOR_SECOND = 40
# Multiples of the average's scale whose losses make the parabola.
POINTS = (0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Ration:
    """Which samples are spent on what.

    Attributes:
        scale: Those that the scale of the sum is chosen on, none if there is no sum.
        left: Those that dense models can be compared on, none of the former, the first first.
        random: Those that random gates are tried on.
        singles: How many checkpoints are measured as themselves.
        rest: Sweeps of one sample that are left for them and the blends.
    """

    scale: list[int]
    left: list[int]
    random: list[int]
    singles: int
    rest: float

    @property
    def unlimited(self) -> bool:
        """Whether all may be measured."""
        return not math.isfinite(self.rest)

    def judged(self, blends: int, spent: int = 0) -> list[int]:
        """Return the samples that so many blends, and the single checkpoints, are compared on.

        Args:
            spent: Sweeps of one sample that went elsewhere.
        """
        if self.unlimited:
            return sorted(self.left)
        each = (self.rest - spent) / max(1, blends + self.singles)
        return sorted(self.left[: max(0, int(each))])


def rationed(
    order: Sequence[int],
    known: Sequence[int],
    allowance: float,
    *,
    blends: int,
    singles: bool,
    mixture: float,
) -> Ration:
    """Divide what may be spent.

    Args:
        order: All samples, the first to be taken first.
        known: Samples that the mixture's own losses are known of, of the same.
        allowance: Sweeps of one sample through a dense model; infinite if all may be measured.
        blends: How many dense models are to be made: the average, and the sum if there is a base
            that it can be made with.
        singles: The checkpoints are to be measured as themselves.
        mixture: What a sample through the mixture costs, in such sweeps; 0 if none is to go.
    """
    whole = set(known)
    count = 0
    if blends > 1 and len(order) > 1:
        count = len(order) // 2
        if math.isfinite(allowance):
            affordable = int(_FOR_SCALE * allowance / len(POINTS))
            most = min(_MOST_FOR_SCALE, len(order) // 2)
            count = min(most, max(_FEWEST_FOR_SCALE, affordable))
    # Samples that ours is not known of can still show the scale.
    last_first = [*reversed(order)]
    scale = sorted(last_first, key=lambda index: index in whole)[:count]
    left = [index for index in order if index in whole and index not in set(scale)]
    if not math.isfinite(allowance):
        tried = sorted(known) if mixture else []
        return Ration(sorted(scale), left, tried, 2 * singles, math.inf)
    random: list[int] = []
    if mixture:
        random = [i for i in order if i in whole][:_RANDOM]
        if len(random) < _RANDOM or mixture * _RANDOM > _FOR_RANDOM * allowance:
            random = []
    rest = allowance - len(POINTS) * len(scale) - mixture * len(random)
    alone = 2 if rest / (blends + 2) >= _FOR_SECOND else 1
    return Ration(sorted(scale), left, sorted(random), alone * singles, rest)
