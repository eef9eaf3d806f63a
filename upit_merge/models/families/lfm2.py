"""LFM2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upit_merge.models.families.base import DenseFamily, Piece

# Of a Llama's configuration: an LFM2, dense or not, has other names for these, or none.
NOT_ITS = ("rms_norm_eps", "hidden_act", "sliding_window", "head_dim")
# What an FFN's matrices are called, an expert's too.
FFN_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PROJECTIONS = {own: projection for projection, own in FFN_NAMES.items()}


class Lfm2(DenseFamily):
    """LFM2 (350M to 2.6B): short convolutions in some layers, attention in the others."""

    model_type = "lfm2"
    title = "LFM2"
    targets = ("lfm2_moe",)
    more_fields = ("layer_types", "conv_bias", "conv_L_cache")
    renames = True

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "intermediate_size": _ffn_size(config),
        }

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "norm_eps": settings["rms_norm_eps"],
            "block_auto_adjust_ff_dim": False,
            "tie_embedding": settings["tie_word_embeddings"],
            **{field: settings[field] for field in self.more_fields},
        }

    def fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(settings)
        return {key: value for key, value in fields.items() if key not in NOT_ITS}

    def stored_name(self, name: str) -> str:
        for projection, own in FFN_NAMES.items():
            name = name.replace(f".mlp.{projection}.", f".feed_forward.{own}.")
        return name

    def pieces(self, name: str, settings: Mapping[str, Any]) -> Sequence[Piece] | None:
        before, _, last = name.removesuffix(".weight").rpartition(".feed_forward.")
        if not before or last not in _PROJECTIONS:
            return None
        return [Piece(f"{before}.mlp.{_PROJECTIONS[last]}.weight")]


def _ffn_size(config: Any) -> int:
    """Return the width that its FFNs have: that of the configuration is only where it begins."""
    size = int(config.intermediate_size)
    if config.block_auto_adjust_ff_dim:
        size = int(2 * size / 3)
        if config.block_ffn_dim_multiplier is not None:
            size = int(config.block_ffn_dim_multiplier * size)
        multiple = config.block_multiple_of
        size = multiple * ((size + multiple - 1) // multiple)
    return size
