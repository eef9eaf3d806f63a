"""Gemma 4, dense."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from upit_merge.models.families.base import Piece, attention_biases
from upit_merge.models.families.composite import LanguagePart

# Settings that shape its layers, as transformers' configuration calls them.
_LAYER_FIELDS = (
    "layer_types",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)
# Settings of layers with full attention, by their published names, and those of all layers.
FULL_LAYERS = {
    "global_head_dim": "head_dim",
    "num_global_key_value_heads": "num_key_value_heads",
}
# What layers have not that take keys and values from an earlier one; files have it all the same.
_OF_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")
_OF_FFN = ("gate_proj", "up_proj", "down_proj")
_IN_LAYER = re.compile(
    r"model\.layers\.(0|[1-9]\d{0,3})\.(?:self_attn|mlp)\.(\w+)\.(?:weight|bias)"
)


def common_layer(config: Any) -> Any:
    """Return transformers' configuration of a layer with a window: it alone tells some sizes."""
    kinds = [kind == "full_attention" for kind in config.layer_types]
    return config.per_layer_config[kinds.index(False) if False in kinds else 0]


def layer_settings(config: Any) -> dict[str, Any]:
    """Return what shapes the layers, from transformers' configuration, dense or a mixture."""
    settings = {field: getattr(config, field) for field in _LAYER_FIELDS}
    # transformers 5.24 keeps the sizes of layers with full attention by layer only.
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    own = config.per_layer_config[full[0]] if full else config
    settings |= {name: getattr(own, field) for name, field in FULL_LAYERS.items()}
    return settings | {"hidden_act": config.hidden_activation}


def has_own_keys(settings: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer does not take keys and values from an earlier one."""
    return layer < int(settings["num_hidden_layers"]) - int(settings["num_kv_shared_layers"])


class Gemma4(LanguagePart):
    """Gemma 4, dense: alone, or in the model of text, images and sound as which it is published."""

    model_type = "gemma4_text"
    other_types = ("gemma4",)
    title = "Gemma 4"
    targets = ("gemma4",)
    beside: ClassVar = {
        "vision_tower.": "vision tower",
        "embed_vision.": "vision tower",
        "audio_tower.": "audio tower",
        "embed_audio.": "audio tower",
    }

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if self.language_part(raw).get("enable_moe_block"):
            return "is a mixture already (enable_moe_block)"
        return None

    def settings(self, config: Any) -> dict[str, Any]:
        settings = super().settings(common_layer(config))
        settings |= layer_settings(config)
        _ = config.kv_sharing_modes  # raises ValueError if there are no layers to share those of
        # Experts have one size: what is narrower is filled up with zeros.
        is_wide = bool(config.use_double_wide_mlp and config.num_kv_shared_layers)
        settings["intermediate_size"] *= 1 + is_wide
        return settings | {"use_double_wide_mlp": is_wide}

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {**attention_biases(config), "qk_norm": True}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {field: settings[field] for field in (*_LAYER_FIELDS, *FULL_LAYERS)}
        if not settings["attention_k_eq_v"]:
            own["num_global_key_value_heads"] = None  # of no meaning, by the published ones
        return {
            **own,
            "hidden_activation": settings["hidden_act"],
            "attention_bias": settings["attention_bias"],
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
        }

    def pieces(self, name: str, settings: Mapping[str, Any]) -> Sequence[Piece] | None:
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            return super().pieces(name, settings)
        has_keys = has_own_keys(settings, int(match[1]))
        if match[2] in _OF_KEYS and not has_keys:
            return ()
        if match[2] in _OF_FFN and has_keys and settings["use_double_wide_mlp"]:
            sizes = settings["intermediate_size"], settings["hidden_size"]
            return [Piece(name, padded=sizes[::-1] if match[2] == "down_proj" else sizes)]
        return None
