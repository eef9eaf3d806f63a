"""Llama and Mistral in, Mixtral out (arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.models.formats.base import MixtureFormat, Modules


class Mixtral(MixtureFormat):
    """Under the names of the published Mixtrals; transformers 5 fuses them in memory only."""

    name = "mixtral"
    title = "Mixtral"
    class_name = "MixtralForCausalLM"
    dense_types = ("llama", "mistral")
    block = "block_sparse_moe"
    projections: ClassVar = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    count_field = "num_local_experts"

    def modules(self) -> Modules:
        from transformers import MistralConfig, MistralForCausalLM, MixtralConfig
        from transformers.models.mistral import modeling_mistral as mistral
        from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

        return Modules(
            dense_config=MistralConfig,
            dense_model=MistralForCausalLM,
            dense_layer=mistral.MistralDecoderLayer,
            rotary=mistral.MistralRotaryEmbedding,
            norm=mistral.MistralRMSNorm,
            moe_config=MixtralConfig,
            moe_layer=MixtralDecoderLayer,
        )

    def read_dense(self, raw: Mapping[str, Any]) -> Any:
        from transformers import LlamaConfig, MistralConfig

        if raw["model_type"] == "mistral":
            return MistralConfig.from_dict(dict(raw))
        config = LlamaConfig.from_dict(dict(raw))
        config.sliding_window = None  # a Llama keeps the key if it is there but does not act on it
        return config

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {self.count_field: num_experts}

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size

    def dense_fields(self, config: Any) -> dict[str, Any]:
        return dict(config.to_dict())
