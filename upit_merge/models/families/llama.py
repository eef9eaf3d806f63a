"""Llama and Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases


class Llama(DenseFamily):
    """Llama 2, 3 and what was made like them: SmolLM2, TinyLlama, Yi, DeepSeek's first."""

    model_type = "llama"
    title = "Llama"
    targets = ("mixtral", "granitemoe", "glm4_moe")

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        config.sliding_window = None  # a Llama keeps the key if it is there but does not act on it
        return config

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {**attention_biases(config), "mlp_bias": bool(config.mlp_bias)}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention_bias": settings["attention_bias"], "mlp_bias": False}


class Mistral(DenseFamily):
    """Mistral 7B, Nemo, Small; their sliding window is carried."""

    model_type = "mistral"
    title = "Mistral"
    targets = ("mixtral",)
