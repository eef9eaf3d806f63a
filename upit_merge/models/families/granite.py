"""Granite 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily


class Granite(DenseFamily):
    """Granite 3.x: a Llama with four multipliers."""

    model_type = "granite"
    title = "Granite"
    targets = ("granitemoe",)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        bias = bool(config.attention_bias)
        return {
            "attention_bias": bias,
            "output_bias": bias,
            "mlp_bias": bool(config.mlp_bias),
            "embedding_multiplier": float(config.embedding_multiplier),
            "attention_multiplier": float(config.attention_multiplier),
            "residual_multiplier": float(config.residual_multiplier),
            "logits_scaling": float(config.logits_scaling),
        }
