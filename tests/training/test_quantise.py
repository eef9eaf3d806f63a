"""`load_in_4bit` and `load_in_8bit` of a mixture: experts in 4 bits, LoRA beside them and on them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY, Family
from tests.support.training import Finetune, changed, cut_off_after_saving
from upit_merge.training.quantise import quantise_experts

pytest.importorskip("bitsandbytes.nn.parametrize")

SETTINGS: Any = SimpleNamespace(
    load_in_4bit=True, load_in_8bit=False, use_bnb_nested_quant=False, bnb_4bit_quant_type="nf4"
)
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = 3


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {**TINY, "hidden_size": 64, "num_experts_per_tok": 2, "intermediate_size": 64}
    settings |= {"num_local_experts": EXPERTS, "head_dim": 16}
    if kind == "qwen3_moe":
        settings |= {"num_experts": EXPERTS, "moe_intermediate_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()


def with_factors(model: Any, parameters: list[str]) -> Any:
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters)
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def dequantised(model: Any) -> Any:
    """The same model with numbers for what 4 bits hold, by bitsandbytes' plain functions."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:
                parameter.data = dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4"))
    return model


def test_convolutions_stay_as_they_are() -> None:
    """Their weights have three dimensions too."""
    settings = {**TINY, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16}
    config = AutoConfig.for_model("qwen3_5_moe_text", **settings, moe_intermediate_size=64)
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantise_experts(model, SETTINGS)
    kept = dict(model.named_parameters())
    gone = {name for name in before if name not in kept}
    assert gone == {name for name in before if ".experts." in name}
    assert any("conv1d" in name for name in kept)
    for name in before.keys() - gone:
        assert torch.equal(kept[name], before[name]), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "parameters", [[], PARAMETERS[:1], PARAMETERS], ids=["none", "one", "both"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_dequantised_experts(
    kind: str, parameters: list[str], checkpointing: bool
) -> None:
    """Losses and gradients, pass after pass; factors neither pile up nor get lost."""
    plain = mixture(kind)
    ours = with_factors(copy.deepcopy(plain), parameters)
    before = sum(p.nbytes for p in ours.parameters())
    experts = sum(p.nbytes for p in ours.parameters() if p.ndim == 3)
    quantise_experts(ours, SETTINGS)
    # A byte holds two of them, which were four bytes each.
    assert before - sum(p.nbytes for p in ours.parameters()) == experts * 7 // 8
    theirs = with_factors(dequantised(plain), parameters)
    ids = torch.arange(3, 35)[None]
    for model in (ours, theirs):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for _ in range(3):
        losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        optimizers = []
        for model, loss in zip((ours, theirs), losses, strict=True):
            model.zero_grad()
            loss.backward()
            optimizers.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
        pairs = [
            (name, parameter.grad, theirs.get_parameter(name).grad)
            for name, parameter in ours.named_parameters()
            if parameter.requires_grad
        ]
        assert len([name for name, *_ in pairs if "experts" in name]) == 4 * len(parameters)
        for name, found, expected in pairs:
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    state = ours.state_dict()
    assert not [name for name in state if "lora" not in name and "parametrizations" in name]


LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "load_in_4bit": True,
    "num_train_epochs": 1,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "gate_up_proj", "down_proj"]])
def test_what_was_learned_is_added_to_the_weights_as_they_were(
    train: Finetune, moe: Path, modules: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = train(moe, lora_target_modules=modules, **LORA)
    assert "The experts take" in caplog.text
    assert "saves nothing" not in caplog.text
    names = changed(moe, out)  # all names and shapes are those of the mixture
    assert {"q_proj" in name or ".experts." in name for name in names} == {True}
    assert any(".experts." in name for name in names) == (len(modules) > 1)
    if len(modules) == 1:
        assert len(names) == 2


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize(
    "modules", [["q_proj"], ["gate_up_proj"], ["q_proj", "gate_up_proj", "down_proj"]]
)
def test_a_run_that_is_cut_off_ends_with_the_same_bytes(
    train: Finetune, moe: Path, bits: bool, modules: list[str]
) -> None:

    settings = {**LORA, "lora_target_modules": modules, "load_in_4bit": bits}
    whole = train(moe, "whole", **settings)
    with cut_off_after_saving():
        train(moe, "cut", **settings)
    cut = train(moe, "cut", **settings)
    assert not changed(whole, cut)


def test_without_checkpointing_nothing_is_saved(
    train: Finetune, moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(moe, lora_target_modules=["q_proj"], gradient_checkpointing=False, **LORA)
    assert "load_in_4bit saves nothing; turn it on" in caplog.text


def test_8_bits_do_not_reach_the_experts(
    train: Finetune, moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**LORA, "load_in_4bit": False, "load_in_8bit": True}
    train(moe, lora_target_modules=["q_proj"], **settings)
    assert "load_in_8bit does not reach the experts" in caplog.text


def test_a_dense_model_is_bitsandbytes_business(
    train: Finetune, four: Family, caplog: pytest.LogCaptureFixture
) -> None:
    train(four.base, lora_target_modules=["up_proj"], **LORA)
    assert "experts" not in caplog.text
