"""Which expert a name means: by the models that a report says the experts were made from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from upit_merge.report.any_version import AnyReport


def expert_names(report: AnyReport) -> dict[str, int]:
    """Return the experts by the names that are one's alone, in lower case.

    Of `./experts/code` and `./experts/math` these are `code` and `math`, and the whole paths. Grown
    experts have no name, and after some were merged none has.
    """
    if report.shrunk:
        return {}
    owners: dict[str, set[int]] = {}
    for expert, model in _models(report):
        for name in {model, *re.split(r"[/\\+]", model)} - {"", ".", ".."}:
            owners.setdefault(name.casefold(), set()).add(expert)
    return {name: min(experts) for name, experts in owners.items() if len(experts) == 1}


def _models(report: AnyReport) -> Iterator[tuple[int, str]]:
    experts = (report.document.get("lineage") or {}).get("experts") or ()
    for number, expert in enumerate(experts):
        checkpoint = expert.get("checkpoint")
        if isinstance(checkpoint, int) and 0 <= checkpoint < len(report.checkpoints):
            yield number, report.checkpoints[checkpoint]
    for extension in report.document.get("extensions") or ():
        if isinstance(extension.get("model"), str) and isinstance(extension.get("expert"), int):
            yield extension["expert"], extension["model"]
