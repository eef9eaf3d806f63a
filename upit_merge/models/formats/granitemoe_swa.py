"""GraniteMoE-SWA: what a SmolLM3 becomes, some of whose layers have no rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from upit_merge.models.families import QUALITIES
from upit_merge.models.families.granite import MULTIPLIERS
from upit_merge.models.families.smollm3 import SmolLM3
from upit_merge.models.formats.base import (
    Constant,
)
from upit_merge.models.formats.granitemoe import GraniteMoe

# What a softmax adds to its sum of exponentials: nothing.
_NO_SINK = -1e4


class GraniteMoeSwa(GraniteMoe):
    """A GraniteMoE with windows, sinks of attention, and a rotary embedding layer by layer.

    Published mixtures have a rotary embedding where they have a window, and some readers tell the
    one by the other. So layers with one get a window as long as the context, which hides nothing.
    """

    name = "granitemoe_swa"
    title = "GraniteMoE-SWA"
    class_name = "GraniteMoeSWAForCausalLM"
    dense_type = "smollm3"
    peft_knows = False
    gate = "router.weight"
    packed: ClassVar = {
        "experts.gate_up_proj": "gate_up_proj",
        "experts.down_proj": "down_proj",
    }
    more_fields = SmolLM3.more_fields
    readers: ClassVar = {"transformers": "", "llama.cpp": "", "vLLM": ""}
    attention = "eager"

    def caution(self, settings: Mapping[str, Any]) -> str | None:
        return None

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        has_rope = [bool(rope) for rope in settings["no_rope_layers"]]  # 1 where there is one
        theta = settings["rope_parameters"]["rope_theta"]
        return {
            **super().own_fields(settings, num_experts),
            "shared_intermediate_size": 0,
            "layer_types": [f"{'sliding' if rope else 'full'}_attention" for rope in has_rope],
            "layer_rope_theta": [theta if rope else 0 for rope in has_rope],
            "no_rope_layers": [int(rope) for rope in has_rope],
        }

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "sliding_window": fields["max_position_embeddings"]}

    def unfit_mixture(self, config: Any) -> str | None:
        if config.shared_intermediate_size:
            return "has shared experts (shared_intermediate_size)"
        return None

    def unfit_dense(self, settings: Mapping[str, Any], config: Any) -> str | None:
        plain = {**QUALITIES, "attention_multiplier": settings["head_dim"] ** -0.5}
        for name in MULTIPLIERS:
            if settings[name] != plain[name]:
                return f"has {name} {settings[name]:g}, as no dense SmolLM3"
        if {*config.layer_rope_theta} - {0, settings["rope_parameters"]["rope_theta"]}:
            return "has several rotary bases (layer_rope_theta), as no dense SmolLM3"
        if config.sliding_window < config.max_position_embeddings:
            return "has a window in some layers (sliding_window), as no dense SmolLM3"
        return None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        has_rope = [int(theta != 0) for theta in config.layer_rope_theta]
        return {**super().qualities(config), "no_rope_layers": has_rope}

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        yield from super().constants(settings, num_experts)
        for layer in range(settings["num_hidden_layers"]):
            name = f"{self.layer_prefix(layer)}self_attn.sinks"
            yield Constant(name, (settings["num_attention_heads"],), _NO_SINK)
