"""GraniteMoE: what a Granite 3 becomes, and others whose readers take its multipliers and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from upit_merge.models.families.base import attention_biases
from upit_merge.models.families.granite import MULTIPLIERS, multiplier_fields
from upit_merge.models.formats.base import (
    Constant,
    MixtureFormat,
)

_BIASES = "attention_bias"


class GraniteMoe(MixtureFormat):
    """Under the names of the published Granite 3 mixtures: all experts of a layer in two tensors."""

    name = "granitemoe"
    title = "GraniteMoE"
    class_name = "GraniteMoeForCausalLM"
    dense_type = "granite"
    block = "block_sparse_moe"
    gate = "router.layer.weight"
    packed: ClassVar = {
        "input_linear.weight": "gate_up_proj",
        "output_linear.weight": "down_proj",
    }
    count_field = "num_local_experts"
    expresses = frozenset(
        {
            "attention_bias",
            "output_bias",
            *MULTIPLIERS,
        }
    )
    readers: ClassVar = {
        "transformers": "",
        "vLLM": "not with attention biases, which it drops without a word",
        "llama.cpp": "",
        "mlx-lm": "",
    }
    peft_knows = False
    gate_path = "block_sparse_moe.router"
    experts_path = "block_sparse_moe.experts"

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        head, heads = settings["head_dim"], settings["num_attention_heads"]
        if head * heads != settings["hidden_size"]:
            return f"has a head_dim ({head}) that {self.title} cannot express"
        if settings["sliding_window"]:
            return f"sets sliding_window, which {self.title} cannot express"
        return super().unfit(settings)

    def caution(self, settings: Mapping[str, Any]) -> str | None:
        if not settings[_BIASES]:
            return None
        return (
            "vLLM drops the attention biases of a GraniteMoE without a word, and computes other "
            "tokens; transformers, llama.cpp and mlx-lm run it."
        )

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            _BIASES: settings["attention_bias"] or settings["output_bias"],
            **multiplier_fields(settings),
        }

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        multipliers = {name: getattr(config, name) for name in MULTIPLIERS}
        return {**attention_biases(config), **multipliers}

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        # One setting gives biases to all four matrices.
        is_missing = settings["attention_bias"] and not settings["output_bias"]
        for layer in range(settings["num_hidden_layers"] if is_missing else 0):
            name = f"{self.layer_prefix(layer)}self_attn.o_proj.bias"
            yield Constant(name, (settings["hidden_size"],))

    def embedding_scale(self, config: Any) -> float:
        return float(config.embedding_multiplier)

    def logits_scale(self, config: Any) -> float:
        return 1 / float(config.logits_scaling)
