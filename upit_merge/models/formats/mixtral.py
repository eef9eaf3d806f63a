"""Mixtral (arXiv 2401.04088): what a Llama without biases becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.models.formats.base import (
    MixtureFormat,
)


class Mixtral(MixtureFormat):
    """Under the names of the published Mixtrals; transformers 5 fuses them in memory only."""

    name = "mixtral"
    title = "Mixtral"
    class_name = "MixtralForCausalLM"
    dense_type = "llama"
    block = "block_sparse_moe"
    projections: ClassVar = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    count_field = "num_local_experts"

    def readers_of(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        if settings["head_dim"] * settings["num_attention_heads"] == settings["hidden_size"]:
            return self.readers
        return {**self.readers, "mlx-lm": "not with heads of another size than hidden / heads"}

    def dense_type_of(self, settings: Mapping[str, Any]) -> str:
        return "mistral" if settings["sliding_window"] else self.dense_type

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {self.count_field: num_experts}

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size
