"""Qwen3-MoE (arXiv 2505.09388): what a Qwen3 becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.formats.base import (
    MixtureFormat,
)


class Qwen3Moe(MixtureFormat):
    """Under the names of the published Qwen3-30B-A3B; every layer is a mixture."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    class_name = "Qwen3MoeForCausalLM"
    dense_type = "qwen3"
    block = "mlp"
    count_field = "num_experts"
    inner_field = "moe_intermediate_size"
    expresses = frozenset({"qk_norm"})

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            self.inner_field: settings["intermediate_size"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "use_sliding_window": False,
            # Of no meaning without a window, but mistral.rs does not read a Qwen3-MoE without it.
            "max_window_layers": settings["num_hidden_layers"],
        }

    def wanted_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"max_window_layers": fields["num_hidden_layers"]}

    def unfit_mixture(self, config: Any) -> str | None:
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "has dense layers beside its mixtures (mlp_only_layers, decoder_sparse_step)"
        return None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return {"qk_norm": True}

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size
