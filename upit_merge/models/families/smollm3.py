"""SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily, attention_biases


class SmolLM3(DenseFamily):
    """A Llama of which every fourth layer has no rotary embedding."""

    model_type = "smollm3"
    title = "SmolLM3"
    targets = ("granitemoe_swa",)
    more_fields = ("no_rope_layers",)

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if raw.get("use_sliding_window"):
            return "sets use_sliding_window, on the layers that no reader but transformers windows"
        return None

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        config.sliding_window = None  # of no meaning without use_sliding_window
        config.no_rope_layers = config.no_rope_layers[: config.num_hidden_layers]
        return config

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {**attention_biases(config), "mlp_bias": bool(config.mlp_bias)}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention_bias": settings["attention_bias"],
            "mlp_bias": False,
            "no_rope_layers": settings["no_rope_layers"],
            "use_sliding_window": False,
            "sliding_window": None,
        }
