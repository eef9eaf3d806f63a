"""Which expert gets which seed sample: by the samples' losses, or as the data says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upit_merge.config.prompts import check_every_expert
from upit_merge.config.router import ByColumn, RouterSettings
from upit_merge.data.prompts import PromptSource
from upit_merge.data.tokens import TokenizedSample
from upit_merge.errors import UpitError
from upit_merge.router.router_gain import SampleLosses, measure_router_gain


def lowest(losses: Tensor) -> Tensor:
    """The paper's rule (section 3.3): the expert with the lowest perplexity, ties to the first.

    Args:
        losses: (num_samples, num_experts).

    Returns:
        int64, (num_samples,).
    """
    return losses.argmin(dim=1)


def balanced(losses: Tensor) -> Tensor:
    """Return buckets of at most ceil(num_samples / num_experts) samples with the least total loss.

    Solved as a transportation problem. The interior-point method ends in a vertex, whose entries
    are whole numbers because the constraints are those of a bipartite graph; the simplex method,
    which `highs` would choose, takes some thirty times as long for 20,000 samples.

    Args:
        losses: (num_samples, num_experts), finite.

    Returns:
        int64, (num_samples,); of several best solutions always the same one.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    values = losses.double().numpy()
    samples, experts = values.shape
    places = math.ceil(samples / experts)
    # Variables are the entries of the losses, row by row: 1 where the expert gets the sample.
    solution = linprog(
        # Only differences between the experts matter; small numbers suit the solver's tolerances.
        (values - values.min(axis=1, keepdims=True)).ravel(),
        A_eq=sparse.kron(sparse.eye(samples), np.ones((1, experts)), format="csc"),
        b_eq=np.ones(samples),
        A_ub=sparse.kron(np.ones((1, samples)), sparse.eye(experts), format="csc"),
        b_ub=np.full(experts, places),
        method="highs-ipm",
    )
    if solution.x is None:
        raise RuntimeError(f"balanced buckets: {solution.message}")
    shares = solution.x.reshape(samples, experts)
    assigned = shares.argmax(axis=1)
    if shares.max(axis=1).min() < 0.99 or np.bincount(assigned).max() > places:
        raise RuntimeError("balanced buckets: the solution splits samples")
    return torch.from_numpy(assigned)


def shuffled(num_samples: int, num_experts: int, seed: int) -> Tensor:
    """Equal buckets of samples drawn at random: a control for what the other rules' carry.

    Returns:
        int64, (num_samples,).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_samples, generator=generator) % num_experts


def by_column(samples: Sequence[TokenizedSample], rule: ByColumn, num_experts: int) -> Tensor:
    """Return the experts that the data itself names, int64, (num_samples,).

    Raises:
        UpitError: a value names no expert.
    """
    # As texts: a report that was read back has no other keys.
    numbers = None if rule.experts is None else {str(k): n for k, n in rule.experts.items()}
    known = f"from 0 to {num_experts - 1}"
    found = []
    for sample in samples:
        value = sample.label
        if numbers is not None:
            number = numbers.get(str(value))
            if number is None:
                named = shorten(", ".join(map(str, numbers)), 200)
                raise UpitError(
                    f"{sample.source} has {value!r} in the column `{rule.column}`, which is not "
                    f"among router.assign.experts ({named}); add it there."
                )
        elif isinstance(value, str) and not value.strip().isdecimal():
            raise UpitError(
                f"{sample.source} has {value!r} in the column `{rule.column}`, which is no "
                "expert's number; say in router.assign which expert it means, such as "
                f"{{column: {rule.column}, experts: {{{value}: 0}}}}."
            )
        else:
            number = int(value or 0)
        if not 0 <= number < num_experts:
            raise UpitError(
                f"{sample.source} belongs to expert {number} by the column `{rule.column}`, but "
                f"the experts are numbered {known}; correct the data or router.assign.experts."
            )
        found.append(number)
    return torch.tensor(found, dtype=torch.int64)


def by_prompts(
    samples: Sequence[TokenizedSample], num_experts: int, source: PromptSource
) -> Tensor:
    """Return the experts that prompts were written for, int64, (num_samples,).

    Args:
        source: Where they are from.

    Raises:
        UpitError: an expert has none, or there is no such expert.
    """
    found = [int(sample.label or 0) for sample in samples]
    check_every_expert({*found}, num_experts, source)
    return torch.tensor(found, dtype=torch.int64)


def named(samples: Sequence[TokenizedSample], settings: RouterSettings, num_experts: int) -> Tensor:
    """Return the experts that samples come with, see `RouterSettings.names_experts`.

    Raises:
        UpitError: as `by_column` and `by_prompts`.
    """
    if isinstance(settings.assign, ByColumn):
        return by_column(samples, settings.assign, num_experts)
    return by_prompts(samples, num_experts, settings.prompts_source)


@dataclass(frozen=True)
class Buckets:
    """Which expert each seed sample belongs to.

    Attributes:
        assigned: The expert of every sample, int64, (num_samples,).
        num_experts: How many there are.
        losses: Of every sample under every expert; None if the data itself assigns the samples.
    """

    assigned: Tensor
    num_experts: int
    losses: SampleLosses | None = None

    @property
    def sizes(self) -> list[int]:
        """Samples of every expert."""
        return torch.bincount(self.assigned, minlength=self.num_experts).tolist()

    def rows(self) -> list[dict[str, Any]]:
        """Per expert: its bucket's size, its loss there, and its loss on all samples."""
        rows: list[dict[str, Any]] = [
            {"expert": expert, "samples": size, "loss_own": None, "loss_all": None}
            for expert, size in enumerate(self.sizes)
        ]
        if self.losses is not None:
            means = self.losses.means
            for expert, row in enumerate(rows):
                mine = self.assigned == expert
                row["loss_own"] = float(means[mine, expert].mean()) if mine.any() else None
                row["loss_all"] = float(means[:, expert].mean())
        return rows

    def to_report(self) -> dict[str, Any]:
        """Plain numbers: the table, and what is given up for equal buckets."""
        report: dict[str, Any] = {"experts": self.rows()}
        if self.losses is None:
            return report
        report["losses"] = dict(self.losses.told)
        means = self.losses.means
        best = float(means.min(dim=1).values.mean())
        given = float(means.gather(1, self.assigned.unsqueeze(1)).mean())
        return report | {
            "loss_of_best_single_expert": float(means.mean(dim=0).min()),
            "loss_of_best_expert_per_sample": best,
            "loss_of_assigned_expert": given,
            "loss_given_up": given - best,
            "worth": measure_router_gain(self.losses).to_report(),
        }


def assign_by_loss(losses: SampleLosses, rule: Literal["balanced", "lowest"]) -> Buckets:
    """Sort samples by their losses."""
    means = losses.means
    assigned = balanced(means) if rule == "balanced" else lowest(means)
    return Buckets(assigned, means.shape[1], losses)
