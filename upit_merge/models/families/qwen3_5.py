"""Qwen3.5: three of four layers have a linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.models.families.base import attention_biases, rotary_share
from upit_merge.models.families.composite import LanguagePart

# Settings that shape its layers, as transformers' configuration calls them.
_LINEAR_FIELDS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


class Qwen35(LanguagePart):
    """Qwen3.5, dense: alone, or in the model of text and images as which it is published."""

    model_type = "qwen3_5_text"
    other_types = ("qwen3_5",)
    title = "Qwen3.5"
    targets = ("qwen3_5_moe",)
    more_fields = ("layer_types", *_LINEAR_FIELDS)
    beside: ClassVar = {"visual.": "vision tower", "mtp.": "layer that predicts further tokens"}

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if self.language_part(raw).get("attn_output_gate") is False:
            return "sets attn_output_gate: false, which a Qwen3.5-MoE cannot express"
        return None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {
            **attention_biases(config),
            "qk_norm": True,
            "partial_rotary_factor": rotary_share(config),
        }

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention_bias": settings["attention_bias"],
            **{field: settings[field] for field in self.more_fields},
        }
