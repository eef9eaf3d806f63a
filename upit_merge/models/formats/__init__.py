"""The formats an output can have. One more is one more file and one more entry of `FORMATS`."""

from __future__ import annotations

from upit_merge.models.formats.base import PROJECTIONS, MixtureFormat, Modules
from upit_merge.models.formats.mixtral import Mixtral
from upit_merge.models.formats.qwen3_moe import Qwen3Moe

FORMATS: dict[str, MixtureFormat] = {f.name: f for f in (Mixtral(), Qwen3Moe())}

DENSE_TYPES: tuple[str, ...] = tuple(kind for f in FORMATS.values() for kind in f.dense_types)


# The names of the setting with the number of experts.
COUNT_FIELDS: tuple[str, ...] = tuple(f.count_field for f in FORMATS.values())


def format_of_dense(model_type: object) -> MixtureFormat | None:
    """Return what dense checkpoints of a `model_type` become; None if there is nothing."""
    return next((f for f in FORMATS.values() if model_type in f.dense_types), None)


__all__ = [
    "COUNT_FIELDS",
    "DENSE_TYPES",
    "FORMATS",
    "PROJECTIONS",
    "MixtureFormat",
    "Modules",
    "format_of_dense",
]
