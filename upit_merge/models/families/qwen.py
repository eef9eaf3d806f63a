"""Qwen2, Qwen2.5 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily

_WINDOW = "sets use_sliding_window, which acts on other layers in a {title}"


class Qwen2(DenseFamily):
    """Qwen2, Qwen2.5 and their Coder and Math models: biases of queries, keys and values."""

    model_type = "qwen2"
    title = "Qwen2.5"
    targets = ("glm4_moe", "granitemoe")

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        return _WINDOW.format(title="GLM-4-MoE") if raw.get("use_sliding_window") else None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {"attention_bias": True}


class Qwen3(DenseFamily):
    """Qwen3: queries and keys are normalised, head by head."""

    model_type = "qwen3"
    title = "Qwen3"
    targets = ("qwen3_moe",)

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        return _WINDOW.format(title="Qwen3-MoE") if raw.get("use_sliding_window") else None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        bias = bool(config.attention_bias)
        return {"qk_norm": True, "attention_bias": bias, "output_bias": bias}
