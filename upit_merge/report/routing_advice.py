"""What to do about experts that are hardly used, or nearly one: sentences, and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from upit_merge.errors import argument, counted, runs


def advice_on(document: Mapping[str, Any], out: str, seeds: str) -> list[dict[str, str]]:
    """Return what to do about what was found: a `text`, and mostly the `command` that does it.

    Args:
        document: What `upit-merge inspect --json` writes.
        out, seeds: The mixture, and seed data: as they are to stand in the commands.
    """
    experts, chosen = document["num_experts"], document["chosen"]
    if document["few_tokens"]:
        return [
            {
                "text": "An expert's even share is too few tokens to call one unused; give more "
                "text before anything is changed."
            }
        ]
    found: list[dict[str, str]] = []
    idle = [row["expert"] for row in document["experts"] if row["state"] != "used"]
    twins = [pair["experts"] for pair in document["pairs"] if pair["by_weights"]]
    left = max(chosen, experts - len({*idle, *(max(pair) for pair in twins)}))
    shrink = f"upit-merge shrink {argument(out)} --data {argument(seeds)} --experts {left}"
    if idle and left < experts:
        found.append(
            {
                "text": f"{_listed(idle)} hardly used over all layers: merge what the router does "
                "not use into what it judges alike.",
                "command": shrink,
            }
        )
    dead = document["usage"]["dead"]
    if dead and not idle:
        found.append(
            {
                "text": "Every expert is used over all layers, but some not at all in one "
                f"({counted(len(dead), 'dead place')}): fit the gates anew, on text of every kind "
                "that the model is to know, and not on what it is measured on.",
                "command": f"upit-merge router {argument(out)} --data {argument(seeds)}",
            }
        )
    if twins and left < experts:
        found.append(
            {
                "text": f"Experts {pairs_named(twins)} have nearly the same weights, so that a "
                "second one costs memory and adds little: merge them, or train the mixture until "
                "they differ (`upit-merge finetune`).",
                "command": shrink,
            }
        )
    same = [p["experts"] for p in document["pairs"] if p["by_routing"] and not p["by_weights"]]
    if same:
        found.append(
            {
                "text": f"The router cannot tell experts {pairs_named(same)} apart, though their "
                "weights differ: fit the gates anew.",
                "command": f"upit-merge router {argument(out)} --data {argument(seeds)}",
            }
        )
    for earlier, later in pairwise(found):
        if earlier.get("command") == later["command"]:
            del earlier["command"]  # it does both
    return found or [{"text": "Nothing: every expert is used, and no two are alike."}]


def hardly_used(
    idle: Sequence[int],
    num_experts: int,
    num_bytes: int | None,
    tokens: str,
    folder: str = "",
    data: str = "",
) -> str:
    """Return which experts the gates hardly use, and what dropping them would save.

    Args:
        idle: The experts, of which there is one at least.
        num_bytes: What they take on disk; None if that is not known.
        tokens: Of which they get less than a tenth of an even share.
        folder, data: The mixture, and the options that name seed data, as they are to stand in the
            command that drops them; without, as on a card, that is not to be typed as it stands.
    """
    it = "it" if len(idle) == 1 else "them"
    size = f" {_size(num_bytes)}" if num_bytes is not None else " room"
    words = ["upit-merge shrink", folder, f"--experts {num_experts - len(idle)} --how drop", data]
    return (
        f"The gates hardly use {'expert' if len(idle) == 1 else 'experts'} {runs(list(idle))} (less "
        f"than a tenth of an even share of the {tokens}, mean over the layers): dropping {it} would "
        f"save{size} (`{' '.join(filter(None, words))}`)."
    )


def _size(num_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} kB"


def _listed(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
    return f"Expert {shown} is" if len(experts) == 1 else f"Experts {shown} are"


def pairs_named(pairs: Sequence[Sequence[int]]) -> str:
    """Return pairs of experts as a sentence names them."""
    return ", ".join(f"{a} and {b}" for a, b in pairs[:4]) + (", …" if len(pairs) > 4 else "")
