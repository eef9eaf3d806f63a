"""`upit-merge finetune` on mixtures that transformers saves otherwise than they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.composites import build, recipe
from tests.support.families import GEMMA4, QWEN35
from tests.support.training import Finetune, changed, weights

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("mlp.gate.weight", QWEN35),
    "gemma4_text": ("router.proj.weight", GEMMA4 | {"sliding_window": 12}),
}


@pytest.fixture(params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path: Path, merge: Any) -> tuple[Path, str]:
    gate, settings = KINDS[request.param]
    family = build_family(tmp_path / "models", kind=request.param, count=2, **settings)
    return merge(family.recipe(), "moe"), gate


def check(before: Path, after: Path) -> set[str]:
    """Names and settings are as before, and all of it loads; returns what was changed."""
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes()
    _model, told = AutoModelForCausalLM.from_pretrained(after, output_loading_info=True)
    assert not told["missing_keys"] | told["unexpected_keys"]
    return changed(before, after)


def test_ffns_and_routers(train: Finetune, mixture: tuple[Path, str]) -> None:
    moe, gate = mixture
    names = check(moe, out := train(moe, train_modules="ffn"))
    assert any(name.endswith(gate) for name in names)
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert not any("attn" in name or "embed" in name for name in names)
    history = json.loads((out / "upit_report.json").read_text())["post_training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(0 < entry["load_entropy"] <= 1 for entry in history)


def test_routers_alone(train: Finetune, mixture: tuple[Path, str]) -> None:
    moe, gate = mixture
    names = check(moe, train(moe, train_modules="router"))
    assert {name.split(".", 4)[-1] for name in names} == {gate}


def test_lora(train: Finetune, mixture: tuple[Path, str]) -> None:
    moe, gate = mixture
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]
    out = train(moe, use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=targets)
    names = check(moe, out)
    kinds = {name.split(".", 4)[-1] for name in names}
    packed = {name for name in weights(moe) if ".experts." in name}
    assert packed < names
    assert kinds == {n.split(".", 4)[-1] for n in packed} | {gate, "self_attn.q_proj.weight"}
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_a_model_of_text_and_images_becomes_checkpoints(
    kind: str, train: Finetune, tmp_path: Path, merge: Any
) -> None:
    base = build(tmp_path / "base", kind)
    out = train(base, train_modules="ffn")
    checkpoints = sorted(map(str, out.glob("checkpoint-*")))
    assert len(checkpoints) == 4
    names = changed(base, Path(checkpoints[-1]))
    assert names
    assert all("language_model" in name and ".mlp." in name for name in names)
    merge(recipe(kind, base, *checkpoints, num_experts=4))
