"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from upit_merge.models.families.base import DenseFamily, Piece, rotary_share


class Phi3(DenseFamily):
    """Phi-3 to Phi-4: what a layer multiplies its inputs with is one matrix, cut as it is read."""

    model_type = "phi3"
    title = "Phi-3/4"
    targets = ("mixtral", "glm4_moe")
    renames = True
    packed: ClassVar = {
        "self_attn.qkv_proj": tuple(f"self_attn.{kind}_proj" for kind in "qkv"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }

    def read(self, raw: Mapping[str, Any]) -> Any:
        config = super().read(raw)
        window = config.sliding_window
        if window and window >= config.max_position_embeddings:
            config.sliding_window = None  # which hides nothing
        rope = dict(config.rope_parameters)
        if rope.get("rope_type", "default") != "default":
            # Other models look for it there alone, and take the whole context if it is not.
            rope["original_max_position_embeddings"] = config.original_max_position_embeddings
            # Its first releases called it su, which readers of other formats do not know.
            rope.pop("type", None)
            config.rope_parameters = rope
        return config

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {"partial_rotary_factor": rotary_share(config)}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {"partial_rotary_factor": settings["partial_rotary_factor"]}
        known = "original_max_position_embeddings"
        if context := (settings["rope_parameters"] or {}).get(known):
            own[known] = context
        return own

    def pieces(self, name: str, settings: Mapping[str, Any]) -> Sequence[Piece] | None:
        before, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "qkv_proj":
            queries, keys = (
                settings[f"num_{kind}_heads"] * settings["head_dim"]
                for kind in ("attention", "key_value")
            )
            sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        elif last == "gate_up_proj":
            sizes = dict.fromkeys(("gate_proj", "up_proj"), settings["intermediate_size"])
        else:
            return None
        pieces, start = [], 0
        for part, size in sizes.items():
            pieces.append(Piece(f"{before}.{part}.weight", (start, start + size)))
            start += size
        return pieces
