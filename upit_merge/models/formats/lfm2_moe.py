"""LFM2-MoE: what an LFM2 becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import TensorSource
from upit_merge.models.families.lfm2 import FFN_NAMES, NOT_ITS, Lfm2
from upit_merge.models.formats.base import (
    Constant,
    MixtureFormat,
)
from upit_merge.models.formats.choosing import to_beat_by_sigmoid
from upit_merge.models.formats.shapes import (
    Shapes,
    ffn_shapes,
    mixture_layers,
)

_NOT_ITS = (*NOT_ITS, "attention_dropout")


class Lfm2Moe(MixtureFormat):
    """Under the names of the published LFM2-8B-A1B; weighs experts by sigmoids."""

    name = "lfm2_moe"
    title = "LFM2-MoE"
    class_name = "Lfm2MoeForCausalLM"
    dense_type = "lfm2"
    peft_knows = False
    block = "feed_forward"
    choice_bias = "expert_bias"
    projections: ClassVar = FFN_NAMES
    count_field = "num_experts"
    readers: ClassVar = {
        "transformers": "5 and later",
        "llama.cpp": "",
        "mlx-lm": "",
        "mistral.rs": "",
        "vLLM": "other tokens on the CPU, not tried on a GPU",
    }
    inner_field = "moe_intermediate_size"
    more_fields = Lfm2.more_fields
    has_dense_layers = True
    gate_path = "feed_forward.gate"
    experts_path = "feed_forward.experts"

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            self.inner_field: settings["intermediate_size"],
            "num_dense_layers": settings["dense_layers"],
            "norm_eps": settings["rms_norm_eps"],
            **{field: settings[field] for field in self.more_fields},
            "tie_embedding": settings["tie_word_embeddings"],
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "routed_scaling_factor": 1.0,
        }

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key not in _NOT_ITS}

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        if settings["head_dim"] * settings["num_attention_heads"] != settings["hidden_size"]:
            return f"has a head_dim ({settings['head_dim']}) that {self.title} cannot express"
        return super().unfit(settings)

    def unfit_mixture(self, config: Any) -> str | None:
        if config.routed_scaling_factor != 1 or not config.norm_topk_prob:
            return "routes otherwise (routed_scaling_factor, norm_topk_prob)"
        if not config.use_expert_bias:
            return "has no biases of experts (use_expert_bias)"
        return None

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def to_beat(self, logits: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
        return to_beat_by_sigmoid(logits, leads)

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "intermediate_size": config.intermediate_size,
            "dense_layers": int(config.num_dense_layers),
        }

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        hidden, head = settings["hidden_size"], settings["head_dim"]
        queries, keys = (settings[f"num_{f}_heads"] * head for f in ("attention", "key_value"))
        yield "model.embed_tokens.weight", (settings["vocab_size"], hidden)
        for layer in range(settings["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}operator_norm.weight", (hidden,)
            if settings["layer_types"][layer] == "conv":
                yield f"{prefix}conv.conv.weight", (hidden, 1, settings["conv_L_cache"])
                linear = {"conv.in_proj": (3 * hidden, hidden), "conv.out_proj": (hidden, hidden)}
                for name, shape in linear.items():
                    yield f"{prefix}{name}.weight", shape
                if settings["conv_bias"]:
                    for name, size in (("conv", hidden), ("in_proj", 3 * hidden)):
                        yield f"{prefix}conv.{name}.bias", (size,)
                    yield f"{prefix}conv.out_proj.bias", (hidden,)
            else:
                for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                    yield f"{prefix}self_attn.{name}.weight", (size, hidden)
                yield f"{prefix}self_attn.out_proj.weight", (hidden, queries)
                yield f"{prefix}self_attn.q_layernorm.weight", (head,)
                yield f"{prefix}self_attn.k_layernorm.weight", (head,)
            yield f"{prefix}ffn_norm.weight", (hidden,)
            yield from ffn_shapes(settings, layer)
        yield self.final_norm_tensor, (hidden,)
        if not settings["tie_word_embeddings"]:
            yield "lm_head.weight", (settings["vocab_size"], hidden)

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        return (self.family.stored_name(dense),)

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        for layer in mixture_layers(settings):
            name = f"{self.layer_prefix(layer)}{self.in_block(self.choice_bias)}"
            yield Constant(name, (num_experts,))

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        return model.tensor(f"{self.layer_prefix(layer)}ffn_norm.weight")

    def final_norm(self, body: Any) -> Any:
        return body.embedding_norm

    @property
    def final_norm_tensor(self) -> str:
        return "model.embedding_norm.weight"
