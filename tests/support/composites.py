"""Models of text and images, as the Hub has those whose language models are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.conftest import TINY, byte_tokenizer
from tests.support.families import GEMMA4, INPUTS, KEYS_SHARED, QWEN35

VISION: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "patch_size": 4,
    },
    "gemma4": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 16,
    },
}
TEXT = {"qwen3_5": QWEN35, "gemma4": GEMMA4 | INPUTS | KEYS_SHARED}
KINDS = [*TEXT]
COPIED = {"num_experts": 2, "expansion": "copy"}


def build(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Save a model of text and images as the Hub has it, with a layer for further tokens."""
    torch.manual_seed(seed)
    text = {**TINY, "max_position_embeddings": 512, **TEXT[kind]}
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=VISION[kind], tie_word_embeddings=False
    )
    config.text_config.tie_word_embeddings = False
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe(kind: str, base: Path, *models: Path | str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "upit",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": COPIED | parameters,
    }
