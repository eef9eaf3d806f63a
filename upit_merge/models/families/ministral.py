"""Ministral and Ministral 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily

# By how much queries grow with their position, beyond the context a model was first trained with.
_GROWTH = "llama_4_scaling_beta"


class Ministral(DenseFamily):
    """Mistrals whose layers may differ in their window; a mixture has one for all."""

    model_type = "ministral"
    title = "Ministral"
    targets = ("mixtral",)

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if len({str(kind) for kind in raw.get("layer_types") or ()}) > 1:
            return "has a window in some layers only (layer_types), but a Mixtral in all or none"
        return None

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        if "full_attention" in config.layer_types:
            config.sliding_window = None
        return config


class Ministral3(DenseFamily):
    """Mistrals that scale queries by their position, beyond the context of their first training.

    No format does. Up to that context they are Mistrals, and what is made of them has it.
    """

    model_type = "ministral3"
    title = "Ministral 3"
    targets = ("mixtral",)

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        rope = dict(config.rope_parameters)
        rope.pop("max_position_embeddings", None)
        if rope.pop(_GROWTH, None) and rope.get("original_max_position_embeddings"):
            limit = int(rope["original_max_position_embeddings"])
            config.max_position_embeddings = min(config.max_position_embeddings, limit)
        config.rope_parameters = rope
        return config

    def caution(self, raw: Mapping[str, Any]) -> str | None:
        rope = raw.get("rope_parameters") or {}
        if not rope.get(_GROWTH, 0.1):
            return None
        return (
            f"Beyond {self.read(raw).max_position_embeddings:,} tokens a Ministral 3 scales its "
            "queries by their position, which no format can express: the output's context ends "
            "there (max_position_embeddings)."
        )
