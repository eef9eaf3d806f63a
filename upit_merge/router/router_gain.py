"""How much the experts differ on given data: what any router could gain, and whether it is noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upit_merge.data.tokens import TokenizedSample

# Nats per token. Checkpoints of a well-mixed run offer a few thousandths, specialised ones a tenth.
_SMALL_GAIN = 0.01
# A gain below this many standard errors may be chance.
_ERRORS = 2.0
# One expert is the best one for nearly everything.
_NEARLY_ALL = 0.8
# What differing experts do not say: dense models of the same checkpoints may be better still.
ANSWER = "Whether the mixture is worth its bytes, `upit-merge evaluate` tells."


@dataclass(frozen=True)
class SampleLosses:
    """Every sample's loss under every expert.

    Attributes:
        sums: Negative log-likelihood in nats, summed over the first and the second half of a
            sample's target tokens, float64, (num_samples, num_experts, 2).
        counts: Target tokens in either half, float64, (num_samples, 2); the first may be 0.
        told: How they were computed, for the report.
        control: Exact losses of a few samples, where these are not; infinite for experts that a
            sample was not given to.
    """

    sums: Tensor
    counts: Tensor
    told: Mapping[str, Any] = field(default_factory=lambda: {"by": "exact"})
    control: SampleLosses | None = None

    @classmethod
    def of(cls, samples: Sequence[TokenizedSample], by_expert: Sequence[Tensor]) -> SampleLosses:
        """From one (num_samples, 2) tensor of sums for each expert."""
        counts = torch.tensor([sample.halves for sample in samples], dtype=torch.float64)
        return cls(torch.stack(list(by_expert), dim=1), counts)

    @property
    def is_estimated(self) -> bool:
        """Whether they are not exact, at least not all of them."""
        return self.control is not None

    @property
    def means(self) -> Tensor:
        """Nats per target token, (num_samples, num_experts)."""
        return self.sums.sum(2) / self.counts.sum(1, keepdim=True)


@dataclass(frozen=True)
class RouterGain:
    """What choosing an expert for every sample gains over the best single expert; nats per token.

    Attributes:
        gain: With the choice made on the very tokens it is judged by: the ceiling of any router
            that picks one expert for a sample, and too good by the noise in the losses.
        held_out_gain: With the choice made on one half of each sample and judged on the other.
        standard_error: Of `held_out_gain`, over the samples.
        agreement: Share of samples whose two halves prefer the same expert.
        chance: The agreement to expect if the halves had nothing to do with each other.
        best_expert: The one with the lowest mean loss.
        favourite: The one that is best for most samples.
        favourite_share: Their share.
    """

    gain: float
    held_out_gain: float
    standard_error: float
    agreement: float
    chance: float
    best_expert: int
    favourite: int
    favourite_share: float

    @property
    def is_noise(self) -> bool:
        """Whether choosing among the experts gains no more than sampling noise does."""
        return not self.held_out_gain > _ERRORS * self.standard_error

    @property
    def is_worse(self) -> bool:
        """Whether the chosen expert is worse than the best single one, by more than noise."""
        return self.held_out_gain < -_ERRORS * self.standard_error

    @property
    def is_small(self) -> bool:
        return self.held_out_gain < _SMALL_GAIN

    def to_report(self) -> dict[str, Any]:
        """Plain numbers; what could not be measured is None."""
        values = {key: _number(value) for key, value in vars(self).items()}
        return values | {"verdict": self.verdict()}

    def verdict(self) -> str:
        """Return what the numbers say of the experts, in plain words."""
        if self.chance != self.chance:
            return "There are too few samples, or experts, to tell how much the experts differ."
        halves = (
            f"the halves agree on the expert for {self.agreement:.0%} of the samples (chance: "
            f"{self.chance:.0%})"
        )
        if self.is_worse:
            return (
                f"Choosing an expert for each sample gains nothing here: the one that is best on "
                f"half of a sample is worse on the other half than expert {self.best_expert} alone, "
                f"by {-self.held_out_gain:.4f} ± {self.standard_error:.4f} nats per token "
                f"({math.expm1(-self.held_out_gain):.1%} of perplexity); {halves}. {ANSWER}"
            )
        found = (
            f"the right expert for each sample gains {self.held_out_gain:.4f} ± "
            f"{self.standard_error:.4f} nats per token ({-math.expm1(-self.held_out_gain):.1%} of "
            f"perplexity) over expert {self.best_expert} alone, judged on the other half of the "
            f"sample; {halves}"
        )
        if self.is_noise:
            return f"How the experts differ on these samples is within the noise: {found}. {ANSWER}"
        little = "little " if self.is_small else ""
        return f"The experts differ {little}on these samples: {found}. {ANSWER}"

    def warnings(self, *, with_verdict: bool = True) -> list[str]:
        """Return what users should not overlook.

        Args:
            with_verdict: The verdict may be among them; nobody prints it anyway.
        """
        is_alarming = with_verdict and self.is_noise and self.chance == self.chance
        found = [self.verdict()] if is_alarming else []
        if self.favourite_share > _NEARLY_ALL:
            found.append(
                f"Expert {self.favourite} is the best one for {self.favourite_share:.0%} of the "
                "samples: with assign: lowest the mixture will be little more than that expert, with "
                "assign: balanced the others get samples that they predict worse."
            )
        return found


def measure_router_gain(losses: SampleLosses) -> RouterGain:
    """Compare the best expert per sample with the best single one, cross-checked between halves."""
    means = losses.means
    best = int(means.mean(0).argmin())
    chosen = means.argmin(1)
    counts = torch.bincount(chosen, minlength=means.shape[1])
    favourite = int(counts.argmax())
    gain = float((means[:, best] - means.min(1).values).mean())
    held_out = error = agreement = chance = math.nan
    judged = losses.control or losses
    whole = judged.counts.min(1).values > 0
    if means.shape[1] > 1 and int(whole.sum()) > 1:
        halves = judged.sums[whole] / judged.counts[whole].unsqueeze(1)
        choices = halves.argmin(1)  # (samples, 2)
        other = halves.gather(1, choices.flip(1).unsqueeze(1)).squeeze(1)
        gains = (halves[:, best] - other).mean(1)
        held_out = float(gains.mean())
        error = float(gains.std() / math.sqrt(len(gains)))
        agreement = float((choices[:, 0] == choices[:, 1]).double().mean())
        shares = [torch.bincount(c, minlength=means.shape[1]) / len(c) for c in choices.T]
        chance = float((shares[0] * shares[1]).sum())
    share = float(counts[favourite] / len(chosen))
    return RouterGain(gain, held_out, error, agreement, chance, best, favourite, share)


def _number(value: float) -> float | None:
    return None if value != value else value
