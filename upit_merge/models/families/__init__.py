"""The dense models that mixtures are made of. One more is one more file and one more entry."""

from __future__ import annotations

from upit_merge.models.families.base import QUALITIES, SHARED_FIELDS, DenseFamily, Piece
from upit_merge.models.families.cohere2 import Cohere2
from upit_merge.models.families.ernie import Ernie
from upit_merge.models.families.gemma4 import Gemma4
from upit_merge.models.families.granite import Granite
from upit_merge.models.families.lfm2 import Lfm2
from upit_merge.models.families.llama import Llama, Mistral
from upit_merge.models.families.ministral import Ministral, Ministral3
from upit_merge.models.families.olmo2 import Olmo2
from upit_merge.models.families.phi3 import Phi3
from upit_merge.models.families.qwen import Qwen2, Qwen3
from upit_merge.models.families.qwen3_5 import Qwen35
from upit_merge.models.families.refused import REFUSED, refusal
from upit_merge.models.families.seed_oss import SeedOss
from upit_merge.models.families.smollm3 import SmolLM3

FAMILIES: dict[str, DenseFamily] = {
    name: family
    for family in (
        Llama(),
        Mistral(),
        Ministral(),
        Ministral3(),
        Qwen2(),
        Qwen3(),
        Qwen35(),
        Gemma4(),
        Phi3(),
        Granite(),
        SeedOss(),
        SmolLM3(),
        Lfm2(),
        Ernie(),
        Cohere2(),
        Olmo2(),
    )
    for name in (family.model_type, *family.other_types)
}

__all__ = [
    "FAMILIES",
    "QUALITIES",
    "REFUSED",
    "SHARED_FIELDS",
    "DenseFamily",
    "Piece",
    "refusal",
]
