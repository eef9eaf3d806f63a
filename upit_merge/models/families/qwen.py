"""Qwen2, Qwen2.5 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases

_TITLES = {"glm4_moe": "GLM-4-MoE", "qwen3_moe": "Qwen3-MoE"}
_WINDOW = "sets use_sliding_window, which acts on other layers in a {title}"


class _Windowed(DenseFamily):
    """Models that may have windows in their last layers, which published ones have switched off."""

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if not raw.get("use_sliding_window"):
            return None
        # Of some models that switch it on the first layer with a window comes after the last.
        first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
        kinds = raw.get("layer_types") or ["sliding_attention"]
        if isinstance(first, int) and isinstance(layers, int) and first >= layers:
            kinds = raw.get("layer_types") or []
        if "sliding_attention" not in kinds:
            return None
        return _WINDOW.format(title=_TITLES[self.targets[0]])

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        config.sliding_window = None
        return config


class Qwen2(_Windowed):
    """Qwen2, Qwen2.5 and their Coder and Math models: biases of queries, keys and values."""

    model_type = "qwen2"
    title = "Qwen2.5"
    targets = ("glm4_moe", "granitemoe")

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {"attention_bias": True}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"use_sliding_window": False}


class Qwen3(_Windowed):
    """Qwen3: queries and keys are normalised, head by head."""

    model_type = "qwen3"
    title = "Qwen3"
    targets = ("qwen3_moe",)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {"qk_norm": True, **attention_biases(config)}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"use_sliding_window": False, "attention_bias": settings["attention_bias"]}
