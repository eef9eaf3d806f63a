"""Other names of the same tensors: the model is the one that transformers reads there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.conftest import Family, build_family
from tests.support.lora import adapters, with_adapters
from tests.support.naive import load_model, unlike
from tests.support.spoilt import BASE, LAST, SECOND, renamed, sharded

COMPILED = {
    "whole": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "FSDP, checkpointed": lambda name: name.replace(
        ".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."
    ),
    "layer by layer": lambda name: (
        ".".join([*parts[:3], "_orig_mod", *parts[3:]])
        if (parts := name.split("."))[1] == "layers"
        else name
    ),
}


@pytest.mark.parametrize("new", COMPILED.values(), ids=[*COMPILED])
def test_a_compiled_model_is_the_model(
    new: Callable[[str], str], family: Family, merge: Callable[..., Path]
) -> None:
    document = family.recipe(parameters={"num_experts": 4, "backbone": "average"})
    plain = load_model(merge(document, "plain"))
    for folder in (BASE, SECOND, LAST):
        renamed(folder, new)(family)
    sharded(lambda *_: None)(family)
    assert not unlike(load_model(merge(document, "compiled")), plain)


def test_torch_compile_names_its_tensors_so(family: Family) -> None:
    model = AutoModelForCausalLM.from_pretrained(family.base)
    names = torch.compile(model).state_dict()
    assert {COMPILED["whole"](name) for name in model.state_dict()} == set(names)
    model.model.layers[1].compile()  # in place: no other names
    model.model.layers[0] = torch.compile(model.model.layers[0])
    regional = set(model.state_dict())
    assert "model.layers.0._orig_mod.mlp.up_proj.weight" in regional
    assert COMPILED["layer by layer"]("model.layers.0.mlp.up_proj.weight") in regional


@pytest.mark.parametrize("prefix", ["_orig_mod.base_model.model.", "base_model.model._orig_mod."])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_an_adapter_of_a_compiled_model_is_the_adapter(
    prefix: str, settings: dict[str, Any], family: Family, merge: Callable[..., Path]
) -> None:
    with_adapters(family, **settings)
    plain = load_model(merge(adapters(family), "plain"))
    for step in (500, 1500):
        path = family.root / "lora" / f"checkpoint-{step}" / "adapter_model.safetensors"
        stored = load_file(path)
        start = len("base_model.model.")
        save_file({f"{prefix}{name[start:]}": tensor for name, tensor in stored.items()}, path)
    assert not unlike(load_model(merge(adapters(family), "compiled")), plain)


def test_a_tied_model_may_have_its_table_as_head(
    tmp_path: Path, merge: Callable[..., Path]
) -> None:
    """transformers ties in both directions."""
    family = build_family(tmp_path / "family", kind="qwen3", tie_word_embeddings=True)
    document = family.recipe(parameters={"num_experts": 4})
    plain = load_model(merge(document, "plain"))
    ids = torch.arange(3, 40).unsqueeze(0)
    before = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1])(ids).logits
    for folder in (BASE, LAST):
        renamed(folder, lambda n: n.replace("model.embed_tokens.", "lm_head."))(family)
    after = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1])(ids).logits
    assert torch.equal(before, after)
    assert not unlike(load_model(merge(document, "head only")), plain)


def test_a_model_saved_without_its_head(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """`AutoModel` saves it without `model.`; being tied, it lacks nothing."""
    family = build_family(tmp_path / "family", tie_word_embeddings=True)
    plain = load_model(merge(family.recipe(), "plain"))
    ids = torch.arange(3, 40).unsqueeze(0)
    before = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1])(ids).logits
    for folder in (family.base, family.checkpoints[-1]):
        AutoModel.from_pretrained(folder).save_pretrained(folder)
        assert "norm.weight" in load_file(folder / "model.safetensors")
    after = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1])(ids).logits
    assert torch.equal(before, after)
    assert not unlike(load_model(merge(family.recipe(), "headless")), plain)
