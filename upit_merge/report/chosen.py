"""What was chosen for a router on held-out seed samples, in words; for the terminal and the card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from upit_merge.errors import counted
from upit_merge.report.routing_advice import hardly_used
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
        told = _setting(temperature, count)
        yield f"{told}, not chosen: {reason}."
        return
    tried = [found for found in chosen.get("tried", []) if _is_setting(found)]
    own = [f for f in tried if (f["temperature"], f["experts_per_token"]) == (temperature, count)]
    if not tried or not own:
        return
    if len(tried) == 1:
        # Of more experts per token, a temperature or a number would have been tried besides.
        yield "With one expert per token the temperature changes nothing, so none was chosen."
        return
    samples = counted(int(chosen.get("held_out", 0)), "held-out seed sample")
    told, before = (_of_what_was_open(found, tried) for found in (own[0], tried[0]))
    if own[0] is tried[0]:
        yield (
            f"Kept on {samples}: {told}; of {len(tried)} settings none was better by more than "
            "noise."
        )
        return
    gain, error = float(own[0].get("gain") or 0.0), own[0].get("standard_error")
    noise = f" (standard error {float(error):.1%})" if isinstance(error, int | float) else ""
    yield (
        f"Chosen on {samples}: {told}; perplexity on them is {-math.expm1(-gain):.1%}{noise} lower "
        f"than with {before}. As they are what it was chosen on, expect a little less elsewhere."
    )


def _is_setting(found: object) -> bool:
    return (
        isinstance(found, Mapping)
        and isinstance(found.get("temperature"), int | float)
        and isinstance(found.get("experts_per_token"), int)
    )


def _setting(temperature: float, count: int) -> str:
    return f"{counted(count, 'expert')} per token at temperature {temperature:g}"


def _of_what_was_open(found: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> str:
    """Return a setting without what was given, which is the same in all that were tried."""
    temperature, count = found["temperature"], found["experts_per_token"]
    if len({other["experts_per_token"] for other in tried}) == 1:
        return f"temperature {temperature:g}"
    if len({other["temperature"] for other in tried}) == 1:
        return f"{counted(count, 'expert')} per token"
    return _setting(temperature, count)


def idle_experts(chosen: Mapping[str, Any]) -> list[int]:
    """Return the experts with less than a tenth of an even share of the held-out tokens."""
    shares = chosen.get("shares")
    if not isinstance(shares, list) or not all(isinstance(s, int | float) for s in shares):
        return []
    return [i for i, share in enumerate(shares) if share * len(shares) < DEAD_SHARE]


def idle_sentence(chosen: Mapping[str, Any], folder: str = "", data: str = "") -> str:
    """Return which experts the gates hardly use, and what dropping them saves; nothing if none.

    Args:
        folder, data: See `hardly_used`.
    """
    idle, size = idle_experts(chosen), chosen.get("expert_bytes")
    if not idle:
        return ""
    saved = len(idle) * size if isinstance(size, int) else None
    return hardly_used(idle, len(chosen["shares"]), saved, "held-out tokens", folder, data)
