"""LoRA adapters made by PEFT, and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import Family

EVERYTHING = ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"]


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **config: Any) -> dict[str, Any]:
    """Save an adapter with random factors; returns the tensors of PEFT's own merged model."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        merged = model.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def with_adapters(family: Family, count: int = 3, **config: Any) -> list[dict[str, Any]]:
    """Save adapters of a family's base as `lora/checkpoint-*`; returns PEFT's merged models."""
    folders = [family.root / "lora" / f"checkpoint-{500 * step}" for step in range(1, count + 1)]
    return [
        save_adapter(family.base, folder, seed=seed, **config)
        for seed, folder in enumerate(folders)
    ]
