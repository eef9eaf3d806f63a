"""Tiny models in which every kind of layer of their families occurs, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import LLAMA3_ROPE, TINY, build_family

MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}

LFM2: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_multiple_of": 8,
}

COHERE2: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 32, "head_dim": 8}
# Phi-3's own place of the context that it was first trained with: not in its rope settings.
LONG: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.01, 1.02, 1.03],
        "long_factor": [1.0, 1.5, 2.0, 2.5],
    },
}

QWEN35: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}

GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}

INPUTS: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259}

KEYS_SHARED: dict[str, Any] = {"num_kv_shared_layers": 2}

KEYS_ARE_VALUES: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}

# A family, its format, settings and parameters: one for each format, and for what else a layer
# may be.
FORMAT_KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "glm4_moe": ("qwen2", "glm4_moe", {}, {}),
    "glm4_moe, split, dense": (
        "qwen2",
        "glm4_moe",
        {"tie_word_embeddings": True, "num_hidden_layers": 3},
        {"shared": "split", "dense_layers": 1},
    ),
    "granitemoe": (
        "granite",
        "granitemoe",
        {"residual_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
        {},
    ),
    "ernie4_5_moe": ("ernie4_5", "ernie4_5_moe", {"head_dim": 8}, {"shared": "none"}),
    "ernie4_5_moe, split, dense": (
        "ernie4_5",
        "ernie4_5_moe",
        {"head_dim": 8, "num_hidden_layers": 3},
        {"shared": "split", "dense_layers": 1},
    ),
    "lfm2_moe": (
        "lfm2",
        "lfm2_moe",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_multiple_of": 8,
            "conv_bias": True,
        },
        {"dense_layers": 1},
    ),
    "cohere2_moe": (
        "cohere2",
        "cohere2_moe",
        {"num_hidden_layers": 4, "sliding_window": 12, "head_dim": 8, "logit_scale": 0.5},
        {},
    ),
    "granitemoe_swa": ("smollm3", "granitemoe_swa", {"no_rope_layers": [0, 1]}, {}),
    "flex_olmo": ("olmo2", "flex_olmo", {"attention_bias": True}, {}),
    "qwen3_5_moe": ("qwen3_5_text", "qwen3_5_moe", QWEN35, {}),
    "qwen3_5_moe, split": (
        "qwen3_5_text",
        "qwen3_5_moe",
        QWEN35 | {"tie_word_embeddings": True},
        {"shared": "split"},
    ),
    "gemma4": ("gemma4_text", "gemma4", GEMMA4 | {"sliding_window": 12}, {}),
    "phi3": ("phi3", "mixtral", {"sliding_window": 12}, {}),
}

# Beyond every window that the models below have.
TOKENS = 200
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e6,
}


@dataclass(frozen=True)
class Case:
    """A dense model and what it becomes.

    Attributes:
        kind: Its `model_type`.
        architecture: Of the output.
        settings: Of its configuration, beside those of every tiny model.
        parameters: Of the recipe.
        tolerance: Largest difference of logits over the largest logit.
    """

    kind: str
    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    def __str__(self) -> str:
        more = [f"{key}-{value}" for key, value in {**self.settings, **self.parameters}.items()]
        return "-".join([self.kind, self.architecture, *more])[:80]


SPLIT, LAST_DENSE = {"shared": "split"}, {"dense_layers": 1}
CASES = [
    Case("llama", "mixtral"),
    Case("llama", "mixtral", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    Case("llama", "glm4_moe", parameters=LAST_DENSE),
    Case("llama", "glm4_moe", {"head_dim": 12}, SPLIT | LAST_DENSE),
    Case("llama", "granitemoe", {"attention_bias": True}),
    Case("mistral", "mixtral", {"sliding_window": 32}),
    Case("qwen2", "glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    Case("qwen2", "glm4_moe", {"tie_word_embeddings": True}, SPLIT),
    Case("qwen2", "glm4_moe", {"rope_parameters": YARN}),
    Case("qwen2", "granitemoe"),
    Case("qwen3", "qwen3_moe", {"head_dim": 8}),
    Case("seed_oss", "glm4_moe", {"head_dim": 12, "attention_bias": True}),
    Case("mistral", "mixtral", {"sliding_window": None}),
    Case("ministral", "mixtral", {"sliding_window": 32, "head_dim": 8}),
    Case("ministral3", "mixtral", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.0}}),
    Case("phi3", "mixtral", {"sliding_window": 32}),
    Case("phi3", "mixtral", LONG),
    Case("phi3", "glm4_moe", {"sliding_window": 2 * TOKENS}),
    Case("phi3", "glm4_moe", LONG | {"sliding_window": 10**6}),
    Case("qwen2", "glm4_moe", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("phi3", "glm4_moe", {"partial_rotary_factor": 0.5}),
    Case("granite", "granitemoe", MULTIPLIERS | {"tie_word_embeddings": True}),
    Case("granite", "granitemoe", MULTIPLIERS | {"attention_bias": True}),
    Case("smollm3", "granitemoe_swa", {"num_hidden_layers": 4}),
    Case("smollm3", "granitemoe_swa", {"attention_bias": True, "no_rope_layers": [0, 1]}),
    Case("lfm2", "lfm2_moe", LFM2),
    Case("lfm2", "lfm2_moe", LFM2 | {"conv_bias": True, "tie_word_embeddings": False}, LAST_DENSE),
    Case("lfm2", "lfm2_moe", LFM2 | {"block_auto_adjust_ff_dim": False}),
    Case("ernie4_5", "ernie4_5_moe", {"head_dim": 12}, LAST_DENSE),
    Case("ernie4_5", "ernie4_5_moe", {"tie_word_embeddings": False}, {"shared": "zero"}),
    Case("ernie4_5", "ernie4_5_moe", {"head_dim": 8}, SPLIT | LAST_DENSE),
    Case("cohere2", "cohere2_moe", COHERE2 | {"logit_scale": 0.25}),
    Case("cohere2", "cohere2_moe", COHERE2 | {"attention_bias": True}),
    Case("olmo2", "flex_olmo"),
    Case("olmo2", "flex_olmo", {"attention_bias": True, "rope_parameters": YARN}),
]
CASES += [
    Case("qwen3_5_text", "qwen3_5_moe", QWEN35, tolerance=2e-5),
    Case("qwen3_5_text", "qwen3_5_moe", QWEN35 | {"tie_word_embeddings": True}, SPLIT, 2e-5),
    Case("qwen3_5_text", "qwen3_5_moe", QWEN35 | {"attention_bias": True}, tolerance=2e-5),
]
CASES += [
    Case("gemma4_text", "gemma4", GEMMA4),
    Case("gemma4_text", "gemma4", GEMMA4 | KEYS_ARE_VALUES),
    Case("gemma4_text", "gemma4", GEMMA4 | {"attention_bias": True, "tie_word_embeddings": False}),
    Case("gemma4_text", "gemma4", GEMMA4 | INPUTS),
    Case("gemma4_text", "gemma4", GEMMA4 | INPUTS | KEYS_SHARED),
    Case("gemma4_text", "gemma4", GEMMA4 | INPUTS | KEYS_SHARED | {"use_double_wide_mlp": True}),
]
MERGED: dict[str, Any] = {"num_experts": 4, "expansion": "copy"}


def logits(folder: Path) -> torch.Tensor:
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    ids = torch.randint(
        3, TINY["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        return model.eval()(ids).logits


def made(case: Case, folder: Path, merge: Callable[..., Path], **more: Any) -> tuple[Path, Path]:
    """A dense model, and the mixture of four of it."""
    settings = {"max_position_embeddings": 2 * TOKENS, **case.settings}
    family = build_family(folder, count=1, kind=case.kind, **settings)
    recipe = family.recipe(
        architecture=case.architecture, parameters=MERGED | dict(case.parameters), **more
    )
    return family.checkpoints[0], merge(recipe)
