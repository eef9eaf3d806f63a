"""ERNIE-4.5-MoE: what a dense ERNIE 4.5 becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from upit_merge.models.formats.base import (
    Constant,
    MixtureFormat,
)
from upit_merge.models.formats.shapes import (
    mixture_layers,
    routed_size,
)
from upit_merge.models.formats.shared import odd_to_split, shared_name, shared_zeros


class Ernie45Moe(MixtureFormat):
    """Under the names of the published ERNIE-4.5-21B-A3B; a shared expert if wanted."""

    name = "ernie4_5_moe"
    title = "ERNIE-4.5-MoE"
    class_name = "Ernie4_5_MoeForCausalLM"
    dense_type = "ernie4_5"
    block = "mlp"
    choice_bias = "moe_statics.e_score_correction_bias"
    count_field = "moe_num_experts"
    chosen_field = "moe_k"
    readers: ClassVar = {
        "transformers": "",
        "mlx-lm": "",
        "llama.cpp": "with a tokenizer.model only",
        "vLLM": "",
    }
    inner_field = "moe_intermediate_size"
    shared = ("none", "zero", "split")
    has_dense_layers = True

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            self.inner_field: routed_size(settings),
            "moe_num_shared_experts": 0 if settings["shared"] == "none" else 1,
            "moe_layer_start_index": settings["dense_layers"],
            "moe_layer_end_index": settings["num_hidden_layers"] - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            "moe_use_aux_free": True,
            "moe_gate": "topk",
            "use_bias": False,
        }

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        document = dict(fields)
        if "num_experts_per_tok" in document:
            # Its published name, which llama.cpp and vLLM look for.
            document["moe_k"] = document.pop("num_experts_per_tok")
        return document

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        return odd_to_split(settings) or super().unfit(settings)

    def unfit_mixture(self, config: Any) -> str | None:
        if config.moe_num_shared_experts > 1:
            return f"has {config.moe_num_shared_experts} shared experts (moe_num_shared_experts)"
        last = config.num_hidden_layers - 1
        if config.moe_layer_interval != 1 or config.moe_layer_end_index != last:
            return "has dense layers among its mixtures (moe_layer_interval, moe_layer_end_index)"
        if config.use_bias:
            return "has biases (use_bias)"
        return None

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.moe_num_experts, config.moe_intermediate_size

    def chosen(self, config: Any) -> int:
        return int(config.moe_k)

    def qualities(self, config: Any) -> Mapping[str, Any]:
        shared = "none"
        if config.moe_num_shared_experts:
            is_split = config.intermediate_size == 2 * config.moe_intermediate_size
            shared = "split" if is_split else "zero"
        return {
            "intermediate_size": config.intermediate_size,
            "shared": shared,
            "dense_layers": int(config.moe_layer_start_index),
        }

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        return (shared_name(dense),)

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        yield from shared_zeros(settings)
        for layer in mixture_layers(settings):
            name = f"{self.layer_prefix(layer)}{self.in_block(self.choice_bias)}"
            yield Constant(name, (1, num_experts))

    def memory_name(self, within: str) -> str:
        return within.replace("mlp.moe_statics.", "mlp.gate.moe_statics.")

    def plain_name(self, stored: str) -> str:
        return stored.replace("mlp.gate.moe_statics.", "mlp.moe_statics.")
