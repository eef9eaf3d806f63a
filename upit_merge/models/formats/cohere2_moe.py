"""Cohere2-MoE: what a Cohere2 becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import TensorSource
from upit_merge.models.families.cohere2 import Cohere2
from upit_merge.models.formats.base import (
    MixtureFormat,
)
from upit_merge.models.formats.shapes import (
    Shapes,
    llama_shapes,
)


class Cohere2Moe(MixtureFormat):
    """Under the names of the published Command A+; one norm before attention and experts."""

    name = "cohere2_moe"
    title = "Cohere2-MoE"
    class_name = "Cohere2MoeForCausalLM"
    dense_type = "cohere2"
    block = "mlp"
    count_field = "num_experts"
    expresses = frozenset({"attention_bias", "output_bias"})
    more_fields = Cohere2.more_fields
    readers: ClassVar = {
        "transformers": "",
        "llama.cpp": "",
        "vLLM": "other tokens on the CPU, not tried on a GPU",
    }

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            **self.family.own_fields(settings),
            "mlp_layer_types": ["sparse"] * settings["num_hidden_layers"],
            "num_shared_experts": 0,
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
        }

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        # With one, its norms are another kind.
        return {key: value for key, value in fields.items() if key != "rms_norm_eps"}

    def unfit_mixture(self, config: Any) -> str | None:
        if config.rms_norm_eps is not None:
            return "has other norms (rms_norm_eps)"
        if config.num_shared_experts:
            return f"has {config.num_shared_experts} shared experts (num_shared_experts)"
        if config.expert_selection_fn != "softmax":
            return f"routes by {config.expert_selection_fn} (expert_selection_fn)"
        if {*config.mlp_layer_types} != {"sparse"}:
            return "has dense layers beside its mixtures (mlp_layer_types)"
        return None

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return self.family.qualities(config)

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        for name, shape in llama_shapes(settings):
            if not name.endswith("post_attention_layernorm.weight"):
                yield name, shape

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        return model.tensor(f"{self.layer_prefix(layer)}input_layernorm.weight")

    def logits_scale(self, config: Any) -> float:
        return float(config.logit_scale)
