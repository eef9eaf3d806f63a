"""OLMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases


class Olmo2(DenseFamily):
    """Normalises what attention and FFN give, not what they are given."""

    model_type = "olmo2"
    title = "OLMo 2"
    targets = ("flex_olmo",)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return attention_biases(config)

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention_bias": settings["attention_bias"]}
