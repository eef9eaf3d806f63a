"""LoRA adapters made by PEFT, what PEFT itself makes of them, and how ours is compared with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import Family
from tests.support.naive import PROJECTIONS, load_model
from upit_merge.config.recipe import parse_recipe
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import Inputs, opened

FFN = ["gate_proj", "up_proj", "down_proj"]

EVERYTHING = [*FFN, "q_proj", "v_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "FFN only": {"target_modules": FFN},
    "all linear modules": {"target_modules": "all-linear"},
    "by a regular expression": {"target_modules": r".*\.(up|down)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks of their own": {
        "rank_pattern": {"up_proj": 2, "layers.1.mlp.gate_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\.mlp\.down_proj": 11.5},
    },
    "replaced modules": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embeddings and head": {"target_modules": [*FFN, "embed_tokens", "lm_head"]},
    "replaced and DoRA": {"use_dora": True, "modules_to_save": ["lm_head"]},
}


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


def adapters(family: Family, **extra: Any) -> dict[str, Any]:
    return family.recipe(models=[str(family.root / "lora" / "checkpoint-*")], **extra)


@contextmanager
def opened_inputs(document: dict[str, Any]) -> Iterator[Inputs]:
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        yield inputs


def dense_grams(base: dict[str, Any], models: list[dict[str, Any]]) -> torch.Tensor:
    """Inner products of whole deltas in float64, tensor by tensor."""
    grams = []
    for layer in range(2):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.mlp.{projection}.weight"
            deltas = torch.stack([(m[name].double() - base[name].double()).ravel() for m in models])
            grams.append(deltas @ deltas.T)
    return torch.stack(grams)


def assert_grams(gram: torch.Tensor, expected: torch.Tensor) -> None:
    """Merged models in float32 differ from exact ones by their own rounding."""
    norms = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert ((gram - expected).abs() <= 1e-6 * scale).all()


def assert_experts(out: Path, models: list[dict[str, Any]], **tolerance: float) -> None:
    """Expert i is model i's FFN."""
    moe = load_model(out)
    for index, model in enumerate(models):
        for layer in range(2):
            for projection, short in PROJECTIONS.items():
                expert = f"model.layers.{layer}.block_sparse_moe.experts.{index}.{short}.weight"
                dense = model[f"model.layers.{layer}.mlp.{projection}.weight"]
                torch.testing.assert_close(moe[expert], dense, **tolerance)
