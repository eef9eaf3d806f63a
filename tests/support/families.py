"""Settings of tiny models in which every kind of layer of their families occurs."""

from __future__ import annotations

from typing import Any

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

# One for each format, and for what else a layer may be.
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
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
