"""Qwen3 in, Qwen3-MoE out (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.models.formats.base import PROJECTIONS, MixtureFormat, Modules


class Qwen3Moe(MixtureFormat):
    """Under the names of the published Qwen3-30B-A3B; every layer is a mixture."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    class_name = "Qwen3MoeForCausalLM"
    dense_types = ("qwen3",)
    block = "mlp"
    projections: ClassVar = {projection: projection for projection in PROJECTIONS}
    count_field = "num_experts"
    inner_field = "moe_intermediate_size"
    required = ("max_window_layers",)
    biases = ("attention_bias",)

    def attention_norms(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Queries and keys are normalised, head by head."""
        return {"q_norm": (head_dim,), "k_norm": (head_dim,)}

    def modules(self) -> Modules:
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig
        from transformers.models.qwen3 import modeling_qwen3 as qwen3
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

        return Modules(
            dense_config=Qwen3Config,
            dense_model=Qwen3ForCausalLM,
            dense_layer=qwen3.Qwen3DecoderLayer,
            rotary=qwen3.Qwen3RotaryEmbedding,
            norm=qwen3.Qwen3RMSNorm,
            moe_config=Qwen3MoeConfig,
            moe_layer=Qwen3MoeDecoderLayer,
        )

    def unfit_dense(self, raw: Mapping[str, Any]) -> str | None:
        if raw.get("use_sliding_window"):
            return "sets use_sliding_window, which acts on other layers in a Qwen3-MoE"
        return super().unfit_dense(raw)

    def read_dense(self, raw: Mapping[str, Any]) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config.from_dict(dict(raw))

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

    def unfit_mixture(self, config: Any) -> str | None:
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "has dense layers beside its mixtures (mlp_only_layers, decoder_sparse_step)"
        return None

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size

    def dense_fields(self, config: Any) -> dict[str, Any]:
        fields = dict(config.to_dict())
        return fields | {"intermediate_size": config.moe_intermediate_size, "layer_types": None}
