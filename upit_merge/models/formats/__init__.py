"""The formats an output can have. One more is one more file and one more entry of `FORMATS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.formats.base import (
    Constant,
    MixtureFormat,
)
from upit_merge.models.formats.cohere2_moe import Cohere2Moe
from upit_merge.models.formats.ernie4_5_moe import Ernie45Moe
from upit_merge.models.formats.flex_olmo import FlexOlmo
from upit_merge.models.formats.gemma4 import Gemma4Moe
from upit_merge.models.formats.glm4_moe import Glm4Moe
from upit_merge.models.formats.granitemoe import GraniteMoe
from upit_merge.models.formats.granitemoe_swa import GraniteMoeSwa
from upit_merge.models.formats.lfm2_moe import Lfm2Moe
from upit_merge.models.formats.mixtral import Mixtral
from upit_merge.models.formats.qwen3_5_moe import Qwen35Moe
from upit_merge.models.formats.qwen3_moe import Qwen3Moe
from upit_merge.models.formats.shapes import (
    EMBEDDINGS,
    FUSED,
    HEAD,
    PLAIN,
    PROJECTIONS,
    ffn_tensor,
    fits_grouped_products,
    is_shared,
    mixture_layers,
    routed_size,
    shared_tensor,
)

FORMATS: dict[str, MixtureFormat] = {
    f.name: f
    for f in (
        Mixtral(),
        Qwen3Moe(),
        Qwen35Moe(),
        Gemma4Moe(),
        Glm4Moe(),
        GraniteMoe(),
        GraniteMoeSwa(),
        Lfm2Moe(),
        Ernie45Moe(),
        Cohere2Moe(),
        FlexOlmo(),
    )
}

# The names of the setting with the number of experts.
COUNT_FIELDS: tuple[str, ...] = tuple({f.count_field: None for f in FORMATS.values()})


def found_format(config: Mapping[str, Any]) -> MixtureFormat | None:
    """Return of what format a mixture is, by its `config.json`; None if it is none."""
    return next((form for form in FORMATS.values() if form.is_of(config)), None)


__all__ = [
    "COUNT_FIELDS",
    "EMBEDDINGS",
    "FORMATS",
    "FUSED",
    "HEAD",
    "PLAIN",
    "PROJECTIONS",
    "Constant",
    "MixtureFormat",
    "ffn_tensor",
    "fits_grouped_products",
    "found_format",
    "is_shared",
    "mixture_layers",
    "routed_size",
    "shared_tensor",
]
