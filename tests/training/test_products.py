"""How experts are multiplied: in bfloat16 by `bf16: true`; one by one where that alone works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.conftest import build_family
from tests.support.families import GEMMA4, QWEN35
from tests.support.training import Finetune, changed, cut_off_after_saving
from upit_merge.training.products import choose_products

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_5_text": QWEN35,
    "gemma4_text": GEMMA4 | {"sliding_window": 12},
}
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}


@contextmanager
def products_of_experts() -> Iterator[set[torch.dtype]]:
    """The dtypes in which matrices of all experts are multiplied."""
    seen: set[torch.dtype] = set()
    product = functional.grouped_mm

    def spy(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        assert left.dtype == right.dtype
        seen.add(left.dtype)
        return product(left, right, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "grouped_mm", spy)
        yield seen


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_multiplied_in_bfloat16(
    tmp_path: Path, merge: Any, train: Finetune, kind: str
) -> None:
    family = build_family(tmp_path / "models", kind=kind, count=2, **KINDS[kind])
    moe = merge(family.recipe())
    for name, settings in {"all": {}, "LoRA": LORA}.items():
        with products_of_experts() as seen:
            out = train(moe, out=name, use_cpu=True, bf16=True, max_steps=4, **settings)
        assert seen == {torch.bfloat16}, name
        assert any("expert" in tensor for tensor in changed(moe, out))
    with products_of_experts() as seen:
        train(moe, out="float32", use_cpu=True, max_steps=4)
    assert seen == {torch.float32}


def tiny(intermediate_size: int = 48) -> MixtralForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=intermediate_size,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=3,
            )
        )


def gradients(model: MixtralForCausalLM, *, autocast: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(64).view(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]


def test_gradients_are_those_of_one_expert_after_the_other() -> None:
    """That loop of transformers, of linear layers, is what autocast knows."""
    loop, ours = tiny(), tiny()
    loop.set_experts_implementation("eager")
    choose_products(ours, mixed=True)
    found, expected = gradients(ours, autocast=True), gradients(loop, autocast=True)
    exact = gradients(tiny(), autocast=False)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        rounding = float((expected[name] - exact[name]).norm())
        assert float((gradient - expected[name]).norm()) <= 0.2 * rounding + 1e-9, name


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_changes_without_autocast(mixed: bool) -> None:
    model = tiny()
    expected = gradients(tiny(), autocast=False)
    choose_products(model, mixed=mixed)
    found = gradients(model, autocast=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_chosen_stays() -> None:
    model = tiny()
    model.set_experts_implementation("batched_mm")
    choose_products(model, mixed=True)
    assert model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_that_grouped_products_refuse(
    tmp_path: Path, merge: Any, train: Finetune, kind: str
) -> None:
    """As pruned models have: the output itself says how it is multiplied."""
    settings = {**KINDS[kind], "intermediate_size": 44}
    family = build_family(tmp_path / "models", kind=kind, count=2, dtype=torch.bfloat16, **settings)
    moe = merge(family.recipe())
    model = AutoModelForCausalLM.from_pretrained(moe, dtype="auto")
    ids = torch.arange(3, 19)[None]
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):
        model(input_ids=ids)
    with cut_off_after_saving():
        train(moe, use_cpu=True, bf16=True)
    out = train(moe, use_cpu=True, bf16=True)
    assert any("expert" in tensor for tensor in changed(moe, out))
