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

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        factor = settings["attention_multiplier"] or settings["head_dim"] ** -0.5
        return {
            **{name: settings[name] for name in names},
            "attention_multiplier": factor,
            "attention_bias": settings["attention_bias"],
            "mlp_bias": False,
        }
