"""What was chosen for a router on held-out seed samples, in words; for the terminal and the card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from upit_merge.errors import counted, runs
from upit_merge.report.next_steps import SEED
from upit_merge.router.counts import DEAD_SHARE


def chosen_sentences(chosen: Mapping[str, Any]) -> Iterator[str]:
    """Yield what temperature and how many experts per token were chosen, and what it gained.

    Args:
        chosen: As `router.sharpness.Chosen.to_report` gives it; may be of another version.
    """
    temperature, count = chosen.get("temperature"), chosen.get("experts_per_token")
    if not isinstance(temperature, int | float) or not isinstance(count, int):
        return
    if reason := chosen.get("reason"):
        yield f"Temperature {temperature:g} and {counted(count, 'expert')} per token, not chosen: {reason}."
        return
    tried = [found for found in chosen.get("tried", []) if isinstance(found, Mapping)]
    own = [
        f
        for f in tried
        if (f.get("temperature"), f.get("experts_per_token")) == (temperature, count)
    ]
    if not tried or not own:
        return
    samples = counted(int(chosen.get("held_out", 0)), "held-out seed sample")
    if own[0] is tried[0]:
        yield (
            f"Temperature {temperature:g} and {counted(count, 'expert')} per token were kept: of "
            f"{len(tried)} settings none was better on {samples} by more than noise."
        )
        return
    gain, error = float(own[0].get("gain") or 0.0), own[0].get("standard_error")
    margin = f" ± {2 * float(error):.1%}" if isinstance(error, int | float) else ""
    yield (
        f"Chosen on {samples}: temperature {temperature:g}, {counted(count, 'expert')} per token; "
        f"perplexity is {-math.expm1(-gain):.1%}{margin} lower than with temperature "
        f"{tried[0].get('temperature'):g} and {tried[0].get('experts_per_token')}."
    )


def idle_experts(chosen: Mapping[str, Any]) -> list[int]:
    """Return the experts with less than a tenth of an even share of the held-out tokens."""
    shares = chosen.get("shares")
    if not isinstance(shares, list) or not all(isinstance(s, int | float) for s in shares):
        return []
    return [i for i, share in enumerate(shares) if share * len(shares) < DEAD_SHARE]


def idle_sentence(chosen: Mapping[str, Any], folder: str = "") -> str:
    """Return which experts the gates hardly use, and what dropping them saves; nothing if none.

    Args:
        folder: The mixture, as it is to stand in the command that drops them.
    """
    idle = idle_experts(chosen)
    if not idle:
        return ""
    one, left = len(idle) == 1, len(chosen["shares"]) - len(idle)
    size = chosen.get("expert_bytes")
    saved = (
        f" would save {len(idle) * size / 1e6:,.3g} MB" if isinstance(size, int) else " saves room"
    )
    words = ["upit-merge shrink", folder, f"--experts {left} --how drop --data {SEED}"]
    return (
        f"The gates hardly use {'expert' if one else 'experts'} {runs(idle)} (less than a tenth of an "
        f"even share of the held-out tokens): dropping {'it' if one else 'them'}{saved} "
        f"(`{' '.join(filter(None, words))}`)."
    )
