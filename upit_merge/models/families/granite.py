"""Granite 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases

# By what an embedding, a query's product with a key, and what a layer adds are multiplied, and
# logits divided.
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def multiplier_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `config.json` with multipliers has of them: attention's always."""
    factor = settings["attention_multiplier"] or settings["head_dim"] ** -0.5
    return {**{name: settings[name] for name in MULTIPLIERS}, "attention_multiplier": factor}


class Granite(DenseFamily):
    """Granite 3.x: a Llama with four multipliers."""

    model_type = "granite"
    title = "Granite"
    targets = ("granitemoe",)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {
            **attention_biases(config),
            "mlp_bias": bool(config.mlp_bias),
            **{name: float(getattr(config, name)) for name in MULTIPLIERS},
        }

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **multiplier_fields(settings),
            "attention_bias": settings["attention_bias"],
            "mlp_bias": False,
        }
