"""Mixtral (arXiv 2401.04088): what a Llama without biases becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.models.formats.base import MixtureFormat


class Mixtral(MixtureFormat):
    """Under the names of the published Mixtrals; transformers 5 fuses them in memory only."""

    name = "mixtral"
    title = "Mixtral"
    class_name = "MixtralForCausalLM"
    block = "block_sparse_moe"
    projections: ClassVar = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    count_field = "num_local_experts"

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {self.count_field: num_experts}

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size
