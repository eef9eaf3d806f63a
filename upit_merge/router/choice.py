"""What the right expert for every sample would give: the best a router for whole samples could do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from upit_merge.router.router_gain import SampleLosses


def best_choice(losses: SampleLosses, groups: Collection[Sequence[int]] = ()) -> Tensor:
    """Return the loss of the best expert for each sample, chosen without what it is judged on.

    A sample's halves are judged each under the expert that is expected to be the best there: by the
    other half, as far as halves agree, and for the rest by the other samples of its kind. Taken for
    all it says, half of a short sample often names the wrong expert, which no router with the whole
    text before it would take. With d the losses of a half per token, less their mean over the
    experts, μ its mean over the other samples of the kind and r the correlation of the halves about
    their kinds' means, what is expected of one half is μ + r (d of the other - μ): the best linear
    prediction (Kelley 1947).

    Args:
        losses: By halves; infinite where unknown.
        groups: Indices of the samples of each kind of text; all are of one kind unless given.

    Returns:
        Nats summed over a sample's targets, float64, (num_samples,); NaN where a half has no target
        or nothing is known.
    """
    sums, counts = losses.sums.double(), losses.counts.double()
    has_targets = counts.min(1).values > 0
    expected = sums / counts.clamp(min=1).unsqueeze(1)  # (samples, experts, halves)
    whole = has_targets & sums.isfinite().flatten(1).all(1)
    kinds = [_members(group, whole) for group in groups or [range(len(sums))]]
    kinds = [kind for kind in kinds if len(kind) > 1]
    if kinds:
        members = torch.cat(kinds)
        expected[members] = _shrunk(expected[members], [len(kind) for kind in kinds])
    chosen = expected.argmin(1)  # (samples, halves): by each half
    judged = sums.gather(1, chosen.flip(1).unsqueeze(1)).squeeze(1).sum(1)
    return torch.where(has_targets & judged.isfinite(), judged, torch.nan)


def _members(group: Sequence[int], known: Tensor) -> Tensor:
    members = torch.tensor([*group], dtype=torch.int64)
    return members[known[members]]


def _shrunk(means: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return what each half lets expect of the other.

    Args:
        means: Nats per token, (samples, experts, 2), one kind after the other.
        sizes: Samples of the kinds, two or more each.
    """
    apart = means - means.mean(1, keepdim=True)  # how hard a text is says nothing of its expert
    others, about = [], []
    for part in apart.split(list(sizes)):
        own, size = part.mean(2, keepdim=True), len(part)
        others.append(((own.sum(0) - own) / (size - 1)).expand_as(part))
        about.append(part - own.mean(0))
    both = torch.cat(about)
    spread = float((both**2).mean())
    agreement = float((both[..., 0] * both[..., 1]).mean()) / spread if spread else 0.0
    prior = torch.cat(others)
    return prior + min(1.0, max(0.0, agreement)) * (apart - prior)
