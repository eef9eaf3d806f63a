"""Cohere2: Command R7B, Command A, Tiny Aya."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases


class Cohere2(DenseFamily):
    """Attention and FFN side by side after one layer norm; rotary only where there is a window."""

    model_type = "cohere2"
    title = "Cohere2"
    targets = ("cohere2_moe",)
    more_fields = ("layer_types", "logit_scale")

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {**attention_biases(config), "rms_norm_eps": config.layer_norm_eps}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention_bias": settings["attention_bias"],
            "layer_norm_eps": settings["rms_norm_eps"],
            **{field: settings[field] for field in self.more_fields},
        }

    def fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(settings)
        fields.pop("rms_norm_eps")
        return fields
