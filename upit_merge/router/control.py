"""Exact losses of a few samples, to tell whether losses to first order can be relied on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.router.router_gain import SampleLosses

# Samples whose exact losses are computed: a twentieth of all, but neither fewer nor more than this.
FEWEST, MOST = 16, 32
SHARE = 0.05
# Experts that each of them is given to; of more, the most promising and some by chance.
EXPERTS = 8
PROMISING = 4
# Losses to first order hold if choosing by them gives up at most this share of the gain.
TOLERATED = 0.1
# And at most so much, nats per token: half a per cent of perplexity, however large the gain.
TOLERATED_LOSS = 0.005
# Nats per token: less is rounding.
ROUNDING = 1e-5
# What losses to first order take, in sweeps of one expert, their control group aside.
FIRST_ORDER_SWEEPS = 4.2
# An expert's offset is drawn towards that of all as if so many more samples had shown the latter.
_PRIOR = 2.0

Pair = tuple[int, int]  # a sample, an expert


def control_size(num_samples: int) -> int:
    """Return how many samples the control group has."""
    return min(num_samples, max(FEWEST, min(MOST, round(SHARE * num_samples))))


def loss_sweeps(settings: RouterSettings, num_experts: int, num_samples: int) -> float:
    """Return how many sweeps the losses of the experts take."""
    control = control_size(num_samples) * min(num_experts, EXPERTS) / num_samples
    estimated = FIRST_ORDER_SWEEPS + control
    if settings.losses == "exact" or (settings.losses == "auto" and estimated >= num_experts):
        return float(num_experts)
    return estimated


def control_pairs(estimated: Tensor, seed: int, size: int | None = None) -> list[Pair]:
    """Choose which samples are given to which experts, the samples spread over all of them.

    Args:
        estimated: Losses to first order, nats per token, (num_samples, num_experts).
        seed: Of what is left to chance.
        size: How many samples, instead of `control_size`; of more, the first are the same.
    """
    samples, experts = estimated.shape
    size = control_size(samples) if size is None else size
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(samples, generator=generator)[:size].sort().values
    single = int(estimated.mean(0).argmin())
    pairs: list[Pair] = []
    for sample in chosen.tolist():
        if experts <= EXPERTS:
            tried = list(range(experts))
        else:
            order = estimated[sample].argsort(stable=True).tolist()
            tried = list(dict.fromkeys([*order[:PROMISING], single]))
            others = torch.randperm(experts, generator=generator).tolist()
            tried += [expert for expert in others if expert not in tried][: EXPERTS - len(tried)]
        pairs += [(sample, expert) for expert in sorted(tried)]
    return pairs


@dataclass(frozen=True)
class PairLosses:
    """The exact losses of some samples under some experts.

    Attributes:
        pairs: A sample and an expert each.
        sums: Negative log-likelihood in nats, summed over the first and the second half of the
            sample's target tokens, float64, (pairs, 2).
        counts: Target tokens in either half, float64, (pairs, 2).
    """

    pairs: Sequence[Pair]
    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """Nats per target token, (pairs,)."""
        return self.sums.sum(1) / self.counts.sum(1)


@dataclass(frozen=True)
class Control:
    """How the losses to first order of some samples compare with the exact ones.

    Attributes:
        losses: The exact ones; infinite for experts that a sample was not given to.
        gain: What the best expert of those tried for a sample gains over the best single expert,
            nats per token.
        given_up: How much more the best of the 1, 2, 3 … most promising experts costs than the
            best of those tried, nats per token, (up to `PROMISING`,).
        agreement: For how many of the samples, of 1, the most promising one is the best.
        offsets: Exact loss less the one to first order, mean per expert, nats per token,
            (num_experts,).
    """

    losses: SampleLosses
    gain: float
    given_up: tuple[float, ...]
    agreement: float
    offsets: Tensor

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.losses.sums)

    @property
    def trusted(self) -> int:
        """How many experts have to be tried for every sample; more than `PROMISING` if all."""
        limit = max(min(TOLERATED * self.gain, TOLERATED_LOSS), ROUNDING)
        holds = (rank for rank, lost in enumerate(self.given_up, 1) if lost <= limit)
        return next(holds, len(self.given_up) + 1)

    def complaint(self) -> str:
        """Return why losses to first order are not enough."""
        share = self.given_up[0] / max(self.gain, ROUNDING)
        return (
            f"The experts are too far apart for losses to first order alone: on {self.size} "
            f"samples the expert they choose gives up {share:.0%} of what the best one gains "
            f"({self.given_up[0]:.4f} of {self.gain:.4f} nats per token)."
        )

    def to_report(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "samples": self.size,
            "gain": self.gain,
            "given_up": self.given_up[0],
            "agreement": self.agreement,
        }

    @classmethod
    def of(cls, estimated: Tensor, exact: PairLosses) -> Control:
        """Compare.

        Args:
            estimated: Losses to first order, nats per token, (num_samples, num_experts).
            exact: Of `control_pairs`.
        """
        experts = estimated.shape[1]
        sample, expert = torch.tensor(exact.pairs).T
        rows, place = sample.unique(return_inverse=True)
        sums = torch.full((len(rows), experts, 2), torch.inf, dtype=torch.float64)
        sums[place, expert] = exact.sums
        counts = torch.zeros(len(rows), 2, dtype=torch.float64)
        counts[place] = exact.counts
        losses = SampleLosses(sums, counts)
        found = losses.means
        # The best single expert, of those that all samples were given to.
        everyone = found.isfinite().all(0)
        single = int(torch.where(everyone, found.mean(0), torch.inf).argmin())
        best = found.min(1).values
        order = estimated[rows].argsort(dim=1, stable=True)
        residual = exact.means - estimated[sample, expert]
        offsets = torch.zeros(experts, dtype=torch.float64).index_add_(0, expert, residual)
        tried = torch.bincount(expert, minlength=experts)
        return cls(
            losses,
            gain=float((found[:, single] - best).mean()),
            given_up=tuple(
                float((found.gather(1, order[:, :count]).min(1).values - best).mean())
                for count in range(1, min(PROMISING, experts) + 1)
            ),
            agreement=float((order[:, 0] == found.argmin(1)).double().mean()),
            offsets=(offsets + _PRIOR * residual.mean()) / (tried + _PRIOR),
        )
