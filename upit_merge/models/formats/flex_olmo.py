"""FlexOlmo (arXiv 2507.07024): what an OLMo 2 becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import TensorSource
from upit_merge.models.formats.base import (
    MixtureFormat,
)
from upit_merge.models.formats.shapes import (
    Shapes,
    llama_shapes,
)

# Rows of the embeddings whose size stands for that of all: frequent tokens come first.
_ROWS = 4096


class FlexOlmo(MixtureFormat):
    """Under the names of the published FlexOlmo-7x7B; norms come after attention and experts."""

    name = "flex_olmo"
    title = "FlexOlmo"
    class_name = "FlexOlmoForCausalLM"
    dense_type = "olmo2"
    block = "mlp"
    count_field = "num_experts"
    expresses = frozenset({"attention_bias", "output_bias"})
    readers: ClassVar = {"transformers": ""}
    adds_output = False

    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        return {
            self.count_field: num_experts,
            **self.family.own_fields(settings),
            "norm_topk_prob": True,
        }

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        if settings["sliding_window"]:
            return f"sets sliding_window, which {self.title} cannot express"
        return super().unfit(settings)

    def unfit_mixture(self, config: Any) -> str | None:
        if not config.norm_topk_prob:
            return "does not normalise the weights of the chosen experts (norm_topk_prob)"
        return None

    def sizes(self, config: Any) -> tuple[int, int]:
        return config.num_experts, config.intermediate_size

    def qualities(self, config: Any) -> Mapping[str, Any]:
        return self.family.qualities(config)

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        hidden, head = settings["hidden_size"], settings["head_dim"]
        for name, shape in llama_shapes(settings):
            before, _, last = name.removesuffix(".weight").rpartition(".")
            if last == "input_layernorm":
                continue
            yield name, shape
            if last == "o_proj":  # the norms of queries and keys are those of all heads together
                for norm, heads in (("q_norm", "attention"), ("k_norm", "key_value")):
                    yield f"{before}.{norm}.weight", (settings[f"num_{heads}_heads"] * head,)
            elif last == "post_attention_layernorm":
                yield f"{before}.post_feedforward_layernorm.weight", (hidden,)

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        """Its gates see the stream itself: the embeddings, and what all norms so far have added."""
        table = "model.embed_tokens.weight"
        rows = min(_ROWS, model.specs[table].shape[0])
        square = model.rows(table, 0, rows).float().square().mean(0)
        for earlier in range(layer + 1):
            for norm in ("post_attention", "post_feedforward")[: 1 if earlier == layer else 2]:
                name = f"{self.layer_prefix(earlier)}{norm}_layernorm.weight"
                square += model.tensor(name).float().square()
        return square.sqrt()
