"""Gemma 4 with its block of experts: what a dense Gemma 4 becomes.

A layer of it adds what one FFN and what its experts give, each normalised, and normalises the sum.
Here the FFN is zero, so that the experts' share is normalised twice: y / sqrt(m + e), with m the
mean square of y and e = rms_norm_eps, and that again. If experts are weighted with c, both
together are y / sqrt(m · (1 + e) + e² / c²), which for c = sqrt(e) is the dense model's norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import TensorSource
from upit_merge.models.families.gemma4 import (
    FULL_LAYERS,
    common_layer,
    has_own_keys,
    layer_settings,
)
from upit_merge.models.formats.base import (
    Constant,
)
from upit_merge.models.formats.composite import CompositeFormat
from upit_merge.models.formats.shapes import (
    FUSED,
    PROJECTIONS,
    Shapes,
    ffn_shapes,
    mixture_layers,
)

# Of the FFN beside the experts, which is zero: as few dimensions as quantisation takes in one piece.
_ZERO_SIZE = 64
_CHOSEN, _OWN_CHOSEN = "num_experts_per_tok", "top_k_experts"
_BEFORE, _BEFORE_EXPERTS = "pre_feedforward_layernorm.", "pre_feedforward_layernorm_2."


class Gemma4Moe(CompositeFormat):
    """Under the names of the published Gemma 4 26B-A4B, all experts of a layer in two tensors."""

    name = "gemma4"
    title = "Gemma 4 with experts"
    class_name = "Gemma4ForCausalLM"
    dense_type = "gemma4_text"
    text_type = "gemma4_text"
    whole_name = "Gemma4ForConditionalGeneration"
    peft_knows = False
    block = ""
    gate = "router.proj.weight"
    packed: ClassVar = {f"experts.{kind}": kind for kind in FUSED}
    count_field = "num_experts"
    chosen_field = _OWN_CHOSEN
    readers: ClassVar = {
        "transformers": "5 and later",
        "mistral.rs": "",
        "llama.cpp": "not tried",
        "mlx-lm": "",
        "vLLM": "does not start on the CPU, not tried on a GPU",
    }
    inner_field = "moe_intermediate_size"
    expresses = frozenset({"attention_bias", "output_bias", "qk_norm"})
    gate_path = "router.proj"
    experts_path = "experts"
    adds_output = False
    router_is_linear = True

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return super().is_of(config) and bool(language_settings(config).get("enable_moe_block"))

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        if settings["use_bidirectional_attention"] == "all":
            return "sets use_bidirectional_attention: all, so that it does not write text"
        return super().unfit(settings)

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            **self.family.own_fields(settings),
            "enable_moe_block": True,
            self.count_field: num_experts,
            self.inner_field: settings["intermediate_size"],
            "intermediate_size": _ZERO_SIZE,
        }

    def rope_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_parameters": settings["rope_parameters"]}

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        alien = ("output_router_logits", "router_aux_loss_coef", "hidden_act", _CHOSEN)
        own = {key: value for key, value in fields.items() if key not in alien}
        return super().document({**own, _OWN_CHOSEN: fields.get(_CHOSEN)})

    def settings(self, config: Any) -> dict[str, Any]:
        return super().settings(common_layer(config)) | layer_settings(config)

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size

    def chosen(self, config: Any) -> int:
        return int(config.top_k_experts)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {**self.family.qualities(config), "mlp_size": config.intermediate_size}

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        hidden, inputs = settings["hidden_size"], settings["hidden_size_per_layer_input"]
        layers = settings["num_hidden_layers"]
        yield "model.embed_tokens.weight", (settings["vocab_size"], hidden)
        if inputs:
            size = settings["vocab_size_per_layer_input"]
            yield "model.embed_tokens_per_layer.weight", (size, layers * inputs)
            yield "model.per_layer_model_projection.weight", (layers * inputs, hidden)
            yield "model.per_layer_projection_norm.weight", (inputs,)
        for layer in range(layers):
            prefix = self.layer_prefix(layer)
            yield f"{prefix}layer_scalar", (1,)
            yield from _attention_shapes(prefix, settings, layer)
            for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
                yield f"{prefix}{place}_layernorm.weight", (hidden,)
            if inputs:
                yield f"{prefix}per_layer_input_gate.weight", (inputs, hidden)
                yield f"{prefix}per_layer_projection.weight", (hidden, inputs)
                yield f"{prefix}post_per_layer_input_norm.weight", (hidden,)
            yield from ffn_shapes(settings, layer)
        yield "model.norm.weight", (hidden,)
        if not settings["tie_word_embeddings"]:
            yield "lm_head.weight", (settings["vocab_size"], hidden)

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        if _BEFORE not in dense:
            return (dense,)
        return dense, dense.replace(_BEFORE, _BEFORE_EXPERTS)

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        hidden, inner = settings["hidden_size"], settings.get("mlp_size", _ZERO_SIZE)
        scale = math.sqrt(settings["rms_norm_eps"])
        for layer in mixture_layers(settings):
            prefix = self.layer_prefix(layer)
            for projection in PROJECTIONS:
                shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
                yield Constant(f"{prefix}mlp.{projection}.weight", shape)
            yield Constant(f"{prefix}post_feedforward_layernorm_1.weight", (hidden,))
            yield Constant(f"{prefix}post_feedforward_layernorm_2.weight", (hidden,), 1.0)
            yield Constant(f"{prefix}router.scale", (hidden,), 1.0)
            yield Constant(f"{prefix}router.per_expert_scale", (num_experts,), scale)

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        prefix = self.layer_prefix(layer)
        (hidden,) = model.specs[f"{prefix}input_layernorm.weight"].shape
        own = f"{prefix}router.scale"
        scale = model.tensor(own).float() if own in model.specs else torch.ones(hidden)
        return scale * hidden**-0.5

    def unfit_router(self, config: Any) -> str | None:
        if config.hidden_size_per_layer_input:
            return "has inputs of their own for its layers (hidden_size_per_layer_input)"
        if config.num_kv_shared_layers:
            return "has layers that share keys and values (num_kv_shared_layers)"
        return None

    def embedding_scale(self, config: Any) -> float:
        return float(config.hidden_size**0.5)

    def logits_cap(self, config: Any) -> float | None:
        cap: float | None = config.final_logit_softcapping
        return cap


def _attention_shapes(prefix: str, settings: Mapping[str, Any], layer: int) -> Shapes:
    """Yield the tensors of a layer's attention: sizes differ by its kind, and some have no keys."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    is_full = settings["layer_types"][layer] == "full_attention"
    head, keys = (settings[n] for n in (FULL_LAYERS if is_full else FULL_LAYERS.values()))
    sizes = {"q_proj": heads * head}
    has_keys = has_own_keys(settings, layer)
    if has_keys:
        sizes["k_proj"] = keys * head
        if not (is_full and settings["attention_k_eq_v"]):
            sizes["v_proj"] = keys * head
    for name, size in sizes.items():
        yield f"{prefix}self_attn.{name}.weight", (size, hidden)
        if settings["attention_bias"]:
            yield f"{prefix}self_attn.{name}.bias", (size,)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, heads * head)
    if settings["attention_bias"]:
        yield f"{prefix}self_attn.o_proj.bias", (hidden,)
    yield f"{prefix}self_attn.q_norm.weight", (head,)
    if has_keys:
        yield f"{prefix}self_attn.k_norm.weight", (head,)
