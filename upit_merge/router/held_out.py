"""Seed samples that gates are not fitted to at first, so that something can be chosen on them."""

from __future__ import annotations

import torch

from upit_merge.config.router import RouterSettings
from upit_merge.router.buckets import Buckets

# Of the seed samples one in so many is held out, but no more than `MOST`.
EVERY, MOST = 4, 64
# With fewer, held out or left to be fitted to, nothing is chosen.
FEWEST, FEWEST_FITTED = 16, 32
# Why the number of experts per token was not open.
GIVEN = "the number of experts per token was given"
OWN = "the number of experts per token is the mixture's own"
TRAINED_FURTHER = "for a mixture that is trained further the number of experts per token is kept"
# In a run, by whether the recipe leaves the number open.
FIXED = {False: GIVEN, True: TRAINED_FURTHER}
# Of temperature and experts per token together, that are tried.
_SETTINGS = 4


def why_nothing_is_chosen(
    settings: RouterSettings, num_experts: int, *, free: bool, fixed: str = OWN
) -> str | None:
    """Return why nothing is chosen with some settings; None if something may be.

    Args:
        free: The number of experts per token was left open.
        fixed: Why it was not, if it was not: one of `GIVEN`, `OWN`, `TRAINED_FURTHER`.
    """
    if settings.temperature is not None and not free:
        if fixed == GIVEN:
            return "temperature and experts per token were given"
        return f"the temperature was given, and {fixed}"
    if num_experts == 1:
        return "there is one expert"
    if settings.prompts is not None:
        return "prompts are no text that a mixture could be measured on"
    if not settings.needs_buckets:
        return f"objective: {settings.objective} fits nothing to the samples' experts"
    if settings.trains_experts:
        return "the experts are trained with their routing vectors"
    if settings.refine is not None:
        return "refining the gates finds their scale"
    return None


def held_out(buckets: Buckets, num_samples: int, seed: int) -> list[int]:
    """Return the samples that gates are not fitted to at first, a share of every bucket.

    There are none if too few would be held out, or left.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_samples, generator=generator).tolist()
    turn: dict[int, int] = {}
    ranked = []
    for index in order:
        bucket = int(buckets.assigned[index])
        turn[bucket] = turn.get(bucket, -1) + 1
        ranked.append((turn[bucket], index))
    # Every bucket gives its first; a bucket of one keeps it for the fit.
    sizes = buckets.sizes
    wanted = [i for rank, i in sorted(ranked) if rank < sizes[int(buckets.assigned[i])] // EVERY]
    chosen = wanted[:MOST]
    if len(chosen) < FEWEST or num_samples - len(chosen) < FEWEST_FITTED:
        return []
    return sorted(chosen)


def choosing_sweeps(settings: RouterSettings, num_experts: int, num_samples: int) -> float:
    """Return how many sweeps of the mixture a choice takes, about."""
    free = settings.temperature is None
    if why_nothing_is_chosen(settings, num_experts, free=free) is not None:
        return 0.0
    held = min(MOST, num_samples // EVERY)
    if held < FEWEST or num_samples - held < FEWEST_FITTED:
        return 0.0
    return _SETTINGS * held / num_samples
