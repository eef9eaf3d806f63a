"""A shared expert that is added as it is, of formats that call it `mlp.shared_experts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from upit_merge.models.formats.base import (
    Constant,
)
from upit_merge.models.formats.shapes import (
    PROJECTIONS,
    mixture_layers,
    routed_size,
    shared_tensor,
)


def shared_name(dense: str) -> str:
    """What half of a split FFN is called in the mixture; all else is called alike."""
    return dense.replace("mlp.shared.", "mlp.shared_experts.")


def odd_to_split(settings: Mapping[str, Any]) -> str | None:
    """Return why an FFN cannot be split into halves, as "has …"; else None."""
    if settings["shared"] == "split" and settings["intermediate_size"] % 2:
        return f"has an odd intermediate_size ({settings['intermediate_size']}) to split"
    return None


def shared_zeros(settings: Mapping[str, Any]) -> Iterator[Constant]:
    """Yield the matrices of shared experts that are nothing, where they are."""
    hidden, inner = settings["hidden_size"], routed_size(settings)
    for layer in mixture_layers(settings) if settings["shared"] == "zero" else ():
        for projection in PROJECTIONS:
            shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
            yield Constant(shared_name(shared_tensor(layer, projection)), shape)
