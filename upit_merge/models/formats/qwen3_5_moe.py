"""Qwen3.5-MoE: what a Qwen3.5 becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import TensorSource
from upit_merge.models.families.qwen3_5 import Qwen35
from upit_merge.models.formats.base import (
    Constant,
)
from upit_merge.models.formats.composite import CompositeFormat
from upit_merge.models.formats.shapes import (
    FUSED,
    PROJECTIONS,
    Shapes,
    llama_shapes,
    mixture_layers,
    routed_size,
    shared_tensor,
)

_SHARED = "mlp.shared_expert"
_SHARED_SIZE = "shared_expert_intermediate_size"
# Dimensions of a shared expert that is zero: as few as quantisation takes in one piece.
_ZERO_SIZES = (64, 32)


class Qwen35Moe(CompositeFormat):
    """Under the names of the published Qwen3.5-35B-A3B, all experts of a layer in two tensors.

    Its shared expert is behind a gate, a sigmoid, which is one half: its gate's weights are zero.
    So that a half of the neurons counts as it did, what it adds is doubled.
    """

    name = "qwen3_5_moe"
    title = "Qwen3.5-MoE"
    class_name = "Qwen3_5MoeForCausalLM"
    dense_type = "qwen3_5_text"
    text_type = "qwen3_5_moe_text"
    whole_name = "Qwen3_5MoeForConditionalGeneration"
    peft_knows = False
    block = "mlp"
    packed: ClassVar = {f"experts.{kind}": kind for kind in FUSED}
    count_field = "num_experts"
    readers: ClassVar = {
        "transformers": "5 and later",
        "llama.cpp": "",
        "mlx-lm": "",
        "vLLM": "ends at the first token on the CPU, not tried on a GPU",
    }
    inner_field = "moe_intermediate_size"
    expresses = frozenset({"attention_bias", "output_bias", "qk_norm", "partial_rotary_factor"})
    more_fields = (*Qwen35.more_fields, _SHARED_SIZE)
    shared = ("zero", "split")

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            self.inner_field: routed_size(settings),
            _SHARED_SIZE: _shared_size(settings),
            "norm_topk_prob": True,
            **self.family.own_fields(settings),
            "attn_output_gate": True,
            "mtp_num_hidden_layers": 0,
            **_interval(settings["layer_types"]),
        }

    def rope_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        rope = dict(settings["rope_parameters"])
        # Everybody who knows the format reads these, and some the other two.
        return {
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": settings["partial_rotary_factor"],
        }

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        if settings["shared"] == "split" and settings["intermediate_size"] % 2:
            return f"has an odd intermediate_size ({settings['intermediate_size']}) to split"
        return super().unfit(settings)

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        routed, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
        is_split = routed == shared
        return {
            **self.family.qualities(config),
            "intermediate_size": 2 * routed if is_split else routed,
            "shared": "split" if is_split else "zero",
        }

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        prefixes = [self.layer_prefix(n) for n in range(settings["num_hidden_layers"])]
        linear = {
            f"{prefix}self_attn.": prefix
            for prefix, kind in zip(prefixes, settings["layer_types"], strict=True)
            if kind == "linear_attention"
        }
        for name, shape in llama_shapes(settings):
            own = next((p for s, p in linear.items() if name.startswith(s)), None)
            if own is None:
                # Queries come with gates of the attention's output.
                is_queries = ".q_proj." in name
                yield name, ((2 * shape[0], *shape[1:]) if is_queries else shape)
            elif name == f"{own}self_attn.q_proj.weight":
                yield from _linear_shapes(own, settings)

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        return (dense.replace("mlp.shared.", f"{_SHARED}."),)

    def factor(self, dense: str) -> float:
        return 2.0 if ".mlp.shared.down_proj." in dense else 1.0

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        hidden, inner = settings["hidden_size"], _shared_size(settings)
        for layer in mixture_layers(settings):
            if settings["shared"] == "zero":
                for projection in PROJECTIONS:
                    shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
                    (name,) = self.backbone_names(shared_tensor(layer, projection))
                    yield Constant(name, shape)
            yield Constant(f"{self.layer_prefix(layer)}{_SHARED}_gate.weight", (1, hidden))

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        return 1 + super().norm_factors(model, layer).float()


def _shared_size(settings: Mapping[str, Any]) -> int:
    """Return the intermediate size of the shared expert; where it is zero, not that of the others.

    By that its `config.json` tells the two kinds apart.
    """
    routed = routed_size(settings)
    if settings["shared"] == "split":
        return routed
    own = settings.get(_SHARED_SIZE)
    return int(own) if own else next(size for size in _ZERO_SIZES if size != routed)


def _interval(layer_types: list[str]) -> dict[str, int]:
    """Return how often there is a full attention, for readers that know no list of layers."""
    first = next((n for n, kind in enumerate(layer_types, 1) if kind == "full_attention"), None)
    if first is None:
        return {}
    like = ["linear_attention"] * (first - 1) + ["full_attention"]
    found = [like[n % first] for n in range(len(layer_types))]
    return {"full_attention_interval": first} if found == [*layer_types] else {}


def _linear_shapes(prefix: str, settings: Mapping[str, Any]) -> Shapes:
    """Yield the tensors of a linear attention."""
    hidden = settings["hidden_size"]
    heads = settings["linear_num_value_heads"]
    keys = settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    values = heads * settings["linear_value_head_dim"]
    prefix += "linear_attn."
    yield f"{prefix}dt_bias", (heads,)
    yield f"{prefix}A_log", (heads,)
    yield f"{prefix}conv1d.weight", (2 * keys + values, 1, settings["linear_conv_kernel_dim"])
    yield f"{prefix}norm.weight", (settings["linear_value_head_dim"],)
    yield f"{prefix}out_proj.weight", (hidden, values)
    for name, size in (("qkv", 2 * keys + values), ("z", values), ("b", heads), ("a", heads)):
        yield f"{prefix}in_proj_{name}.weight", (size, hidden)
