"""How much better one model is than another, paired by sample, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Outcome = Literal["worth", "not_worth", "too_few"]

# Nats per token, 1 % of perplexity: for less nobody would keep twice the bytes.
SMALL = 0.01
# Paired samples below which nothing is said: their spread itself is hardly known.
FEWEST = 20
# The two-sided confidence of every margin of error.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """How much lower our loss is than a rival's, on the samples where both are known.

    Attributes:
        nats: Per target token; more than 0 where ours is lower.
        standard_error: Of it, over the samples; NaN if there are too few.
        error: The margin of error, at 95 % by Student's t; infinite if there are too few samples.
        samples: How many there are.
    """

    nats: float
    standard_error: float
    error: float
    samples: int

    @property
    def outcome(self) -> Outcome:
        """What this gain says, if the rival is the best there is."""
        if self.samples < FEWEST:
            return "too_few"
        if self.nats >= SMALL and self.nats - self.error > 0:
            return "worth"
        return "not_worth" if self.nats + self.error < SMALL else "too_few"

    @property
    def share(self) -> float:
        """How much lower our perplexity is, of the rival's."""
        return -math.expm1(-self.nats)

    @property
    def share_error(self) -> float:
        """The margin of error of `share`."""
        return math.exp(-self.nats) * self.error

    @property
    def needed(self) -> float:
        """How many samples would tell if nothing but their number changed; infinite if unknown."""
        distance = self.nats if self.nats >= SMALL else SMALL - self.nats
        if not math.isfinite(self.standard_error):
            return math.inf
        # Student's t with many samples, and some room: the estimate itself will move.
        wanted = self.samples * (2 * self.standard_error / distance) ** 2
        return max(FEWEST, wanted)

    def __str__(self) -> str:
        """Return how much lower or higher our perplexity is, with the margin of error."""
        margin = f" ± {self.share_error:.1%}" if math.isfinite(self.error) else ""
        return f"{abs(self.share):.1%}{margin} {'lower' if self.nats >= 0 else 'higher'}"


def paired_gain(difference: Tensor, targets: Tensor, strata: Sequence[Sequence[int]] = ()) -> Gain:
    """Return nats per token of a ratio estimator, and its error over the samples.

    The gain is sum(difference) / sum(targets); its variance is that of the residuals
    difference - gain · targets, which counts a sample as one observation whatever its length.

    Args:
        difference: Rival's loss less ours, nats summed over a sample's targets, (num_samples,);
            NaN where one of them is unknown.
        targets: Tokens they are summed over, (num_samples,).
        strata: Indices of the samples of each kind of text. What differs between kinds is then no
            error: another draw would have as many of each.
    """
    known = difference.isfinite() & (targets > 0)
    count = int(known.sum())
    if not count:
        return Gain(math.nan, math.nan, math.inf, 0)
    total = float(targets[known].sum())
    gain = float(difference[known].sum()) / total
    residuals = difference - gain * targets
    # A kind with a single sample has no spread of its own: such are one kind together.
    parts = [part for part in _parts(known, strata) if len(part) > 1]
    lonely = [part for part in _parts(known, strata) if len(part) == 1]
    if lonely:
        parts.append(torch.cat(lonely))
        if len(parts[-1]) == 1 and len(parts) > 1:
            parts[-2:] = [torch.cat(parts[-2:])]
    freedom = count - len(parts)
    if freedom < 1:
        return Gain(gain, math.nan, math.inf, count)
    variance = sum(len(part) * float(residuals[part].var()) for part in parts if len(part) > 1)
    error = math.sqrt(variance) / total
    from scipy.stats import t

    return Gain(gain, error, float(t.ppf((1 + _CONFIDENCE) / 2, freedom)) * error, count)


def _parts(known: Tensor, strata: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    for stratum in strata or [range(len(known))]:
        members = torch.tensor([*stratum], dtype=torch.int64)
        if len(members := members[known[members]]):
            yield members
