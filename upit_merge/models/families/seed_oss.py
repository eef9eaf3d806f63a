"""Seed-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily


class SeedOss(DenseFamily):
    """Seed-OSS: biases of queries, keys and values, heads of a size of their own."""

    model_type = "seed_oss"
    title = "Seed-OSS"
    targets = ("glm4_moe", "granitemoe")
    output_bias_field = "attention_out_bias"

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {
            "attention_bias": bool(config.attention_bias),
            "output_bias": bool(config.attention_out_bias),
            "mlp_bias": bool(config.mlp_bias),
        }

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention_bias": settings["attention_bias"],
            "attention_out_bias": settings["output_bias"],
            "mlp_bias": False,
        }
