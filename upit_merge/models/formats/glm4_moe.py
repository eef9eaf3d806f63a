"""GLM-4-MoE (arXiv 2508.06471): what a Qwen2.5 becomes, and others with biases of their queries.

Of the published mixtures it is the only one with biases of queries, keys and values that every
reader computes. Its router weighs experts by sigmoids, which n identical experts do not notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from upit_merge.models.families.base import rotary_share
from upit_merge.models.formats.base import (
    Constant,
    MixtureFormat,
)
from upit_merge.models.formats.choosing import to_beat_by_sigmoid
from upit_merge.models.formats.shapes import (
    mixture_layers,
    routed_size,
)
from upit_merge.models.formats.shared import odd_to_split, shared_name, shared_zeros


class Glm4Moe(MixtureFormat):
    """Under the names of the published GLM-4.5; a shared expert always, dense layers first."""

    name = "glm4_moe"
    title = "GLM-4-MoE"
    class_name = "Glm4MoeForCausalLM"
    dense_type = "llama"
    block = "mlp"
    choice_bias = "gate.e_score_correction_bias"
    count_field = "n_routed_experts"
    inner_field = "moe_intermediate_size"
    expresses = frozenset({"attention_bias", "partial_rotary_factor"})
    # Without one (n_shared_experts: 0) llama.cpp refuses the model, and mlx divides by zero.
    shared = ("zero", "split")
    has_dense_layers = True
    # mlx-lm finds no head otherwise, and vLLM computes with one of random numbers.
    can_tie = False
    # Without them llama.cpp's converter ends in an error, whatever model it converts.
    wanted_tokens = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>")
    fewest_experts = 2  # it looks at the two best experts of every group of experts

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            # vLLM looks for it under this name.
            "num_experts": num_experts,
            self.inner_field: routed_size(settings),
            "n_shared_experts": 1,
            "first_k_dense_replace": settings["dense_layers"],
            "attention_bias": settings["attention_bias"],
            "use_qk_norm": False,
            "partial_rotary_factor": settings["partial_rotary_factor"],
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        }

    def dense_type_of(self, settings: Mapping[str, Any]) -> str:
        if settings["partial_rotary_factor"] != 1:
            return "phi3"
        if not settings["attention_bias"]:
            return self.dense_type
        size = settings["head_dim"] * settings["num_attention_heads"]
        return "qwen2" if size == settings["hidden_size"] else "seed_oss"

    def unfit_dense(self, settings: Mapping[str, Any], config: Any) -> str | None:
        if settings["partial_rotary_factor"] != 1 and settings["attention_bias"]:
            return "has both attention_bias and partial_rotary_factor, as no dense model"
        return None

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        if settings["sliding_window"]:
            return f"sets sliding_window, which {self.title} cannot express"
        return odd_to_split(settings) or super().unfit(settings)

    def wanted_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_experts": fields[self.count_field], "partial_rotary_factor": 0.5}

    def unfit_mixture(self, config: Any) -> str | None:
        if config.n_group != 1 or config.routed_scaling_factor != 1 or not config.norm_topk_prob:
            return "routes otherwise (n_group, routed_scaling_factor, norm_topk_prob)"
        if config.use_qk_norm:
            return "normalises queries and keys (use_qk_norm)"
        if config.n_shared_experts != 1:
            return f"has {config.n_shared_experts} shared experts (n_shared_experts)"
        return None

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def to_beat(self, logits: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
        return to_beat_by_sigmoid(logits, leads)

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.n_routed_experts, config.moe_intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        dense, routed = config.intermediate_size, config.moe_intermediate_size
        return {
            "attention_bias": bool(config.attention_bias),
            "partial_rotary_factor": rotary_share(config),
            "intermediate_size": dense,
            "shared": "split" if dense == 2 * routed else "zero",
            "dense_layers": int(config.first_k_dense_replace),
        }

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        return (shared_name(dense),)

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        yield from shared_zeros(settings)
        for layer in mixture_layers(settings):
            name = f"{self.layer_prefix(layer)}{self.in_block(self.choice_bias)}"
            yield Constant(name, (num_experts,))
