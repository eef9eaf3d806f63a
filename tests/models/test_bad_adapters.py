"""Bad adapters: one sentence that names the thing and the remedy, and nothing left on the disk.

`tests/support/spoilt.py` says what a case is; what is spoilt is the last of three adapters.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from tests.support.lora import EVERYTHING, save_adapter
from tests.support.spoilt import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    UP,
    Case,
    Malicious,
    Spoil,
    adapter_settings,
    assert_case_refused,
    assert_refused,
    both,
    content,
    each,
    entry,
    moved_out,
    pickled,
    recipe,
    run,
    tensors,
    without,
)

MODULE = "model.layers.1.mlp.up_proj"
PREFIX = f"base_model.model.{MODULE}"
MERGE = "merge it into its base first (PEFT's merge_and_unload)."


@pytest.fixture
def family(adapted: Family) -> Family:
    """A base and three adapters that say they were trained on it."""
    return adapted


def factors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the last adapter's tensors."""
    return tensors(ADAPTER_WEIGHTS, change)


def trained(**config: Any) -> Spoil:
    """Train the last adapter in another way."""

    def spoil(family: Family) -> None:
        shutil.rmtree(family.root / ADAPTER)
        save_adapter(family.base, family.root / ADAPTER, **config)

    return spoil


def on_other_base(**config: Any) -> Spoil:
    """Train the last adapter on a model of other sizes, and tell nobody."""

    def spoil(family: Family) -> None:
        other = build_family(family.root / "other", count=0, **config)
        shutil.rmtree(family.root / ADAPTER)
        save_adapter(other.base, family.root / ADAPTER)
        adapter_settings(base_model_name_or_path=None)(family)

    return spoil


def models(*references: str) -> Spoil:
    """A recipe of these; `@` is the family's folder."""
    return recipe(models=[{"model": reference} for reference in references])


def set_entry(name: str, value: float) -> Spoil:
    return factors(lambda t: t[name].view(-1)[3:4].fill_(value))


WEIGHT_CASES = {
    "no weights": Case(
        without(ADAPTER_WEIGHTS),
        f"Checkpoint {ADAPTER} has an adapter_config.json but no adapter_model.safetensors in {ADAPTER}; give the folder "
        "of a complete adapter.",
    ),
    "pickle without the option": Case(
        pickled(path=ADAPTER_WEIGHTS, name="adapter_model.bin"),
        f"Checkpoint {ADAPTER} has only adapter_model.bin, a pickle that could run code; convert it "
        "to safetensors, or pass --lazy-unpickle to read it with weights_only.",
    ),
    "malicious pickle": Case(
        pickled(lambda state: state.update(a=Malicious()), ADAPTER_WEIGHTS, "adapter_model.bin"),
        f"{ADAPTER}/adapter_model.bin cannot be read with weights_only (it is corrupt or holds "
        "objects other than tensors, which could run code); convert the checkpoint to …",
        ("--lazy-unpickle",),
    ),
    "truncated": Case(
        content(ADAPTER_WEIGHTS, lambda old: old[:-10]),
        f"{ADAPTER_WEIGHTS} is truncated or corrupt (…); copy or download it again.",
    ),
    "link out of the folder": Case(
        moved_out(ADAPTER_WEIGHTS, absolute=True),
        f"{ADAPTER_WEIGHTS} is a link to outside/adapter_model.safetensors, outside its folder; copy the file "
        "there, or link the whole folder.",
    ),
    "configuration out of the folder": Case(
        moved_out(ADAPTER_CONFIG, absolute=True),
        f"{ADAPTER_CONFIG} is a link to outside/adapter_config.json, outside its folder; …",
    ),
    "only one factor": Case(
        factors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")),
        f"Checkpoint {ADAPTER} has not both factors for {MODULE} (it has {PREFIX}.lora_A.weight); "
        "save the adapter again.",
    ),
    "only the other factor": Case(
        factors(lambda t: t.pop(f"{PREFIX}.lora_A.weight")),
        f"Checkpoint {ADAPTER} has not both factors for {MODULE} (it has {PREFIX}.lora_B.weight); …",
    ),
    "no factors for a target": Case(
        factors(lambda t: [t.pop(f"{PREFIX}.lora_{f}.weight") for f in "AB"]),
        f"Checkpoint {ADAPTER} has no tensors for {MODULE}, which its adapter_config.json names; save "
        "the adapter again.",
    ),
    "no module that was to be saved": Case(
        adapter_settings(modules_to_save=["lm_head"]),
        f"Checkpoint {ADAPTER} has no tensors for lm_head, which its adapter_config.json names; save …",
    ),
    "another rank than told": Case(
        adapter_settings(r=8),
        f"Checkpoint {ADAPTER} has factors of shapes [4, …] and […, 4] for …, but its "
        "adapter_config.json says rank 8; save the adapter again.",
    ),
    "another rank than its pattern": Case(
        adapter_settings(rank_pattern={"layers.1.mlp.up_proj": 2}),
        f"Checkpoint {ADAPTER} has factors of shapes [4, 32] and [48, 4] for {MODULE}, but its "
        "adapter_config.json says rank 2; save the adapter again.",
    ),
    "factors that are vectors": Case(
        factors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(4)})),
        f"Checkpoint {ADAPTER} has factors of shapes [4] and [48, 4] for {MODULE}, but …",
    ),
    "a module the base has not": Case(
        factors(
            lambda t: [
                t.update({f"base_model.model.model.router.lora_{f}.weight": torch.zeros(4, 4)})
                for f in "AB"
            ]
        ),
        f"Checkpoint {ADAPTER} changes model.router, which the base base has not; name the base it "
        "was trained on.",
    ),
    "a bias": Case(
        factors(lambda t: t.update({f"{PREFIX}.bias": torch.zeros(48)})),
        f"Checkpoint {ADAPTER} has the tensor {PREFIX}.bias, which is a bias, which cannot be "
        "applied; use a plain LoRA adapter without biases, or merge it into its base first …",
    ),
    **{
        f"tensor {name}": Case(
            factors(lambda t, name=name: t.update({name: torch.zeros(2, 2)})),
            f"Checkpoint {ADAPTER} has the tensor {name}, which cannot be applied; use a plain …",
        )
        for name in (
            f"{PREFIX}.lora_diag",
            "prompt_embeddings",
            f"{MODULE}.lora_A.weight",
        )
    },
    "magnitudes without DoRA": Case(
        both(trained(use_dora=True), adapter_settings(use_dora=False)),
        f"Checkpoint {ADAPTER} has magnitudes for …, but its adapter_config.json sets use_dora to "
        "false; save the adapter again.",
    ),
    "DoRA without magnitudes": Case(
        adapter_settings(use_dora=True),
        f"Checkpoint {ADAPTER} has no magnitudes for …, but its adapter_config.json sets use_dora to "
        "true; save the adapter again.",
    ),
    "DoRA on embeddings": Case(
        trained(use_dora=True, target_modules=["embed_tokens", "up_proj"]),
        f"Checkpoint {ADAPTER} has DoRA on model.embed_tokens, which is not supported on embeddings; "
        f"{MERGE}",
    ),
    "attention only": Case(
        trained(target_modules=["q_proj", "v_proj"]),
        f"Checkpoint {ADAPTER} has trained no FFN module (gate_proj, down_proj, up_proj), so there is "
        "no expert in it; use an adapter that has, as attention is shared by all experts.",
    ),
}

# Found while tensors are compared or written, not when the adapter is opened.
VALUE_CASES = {
    "NaN in a factor": Case(
        set_entry(f"{PREFIX}.lora_A.weight", float("nan")),
        f"Checkpoint {ADAPTER} has NaN or infinite weights in {UP}; use a checkpoint from before the "
        "training diverged.",
    ),
    "infinity in a factor": Case(
        set_entry(f"{PREFIX}.lora_B.weight", float("inf")),
        f"Checkpoint {ADAPTER} has NaN or infinite weights in {UP}; …",
    ),
    "NaN in the base": Case(
        entry(BASE, UP, float("nan")),
        f"Checkpoint base has NaN or infinite weights in {UP}; …",
    ),
    "a product that overflows": Case(
        factors(lambda t: [t[f"{PREFIX}.lora_{f}.weight"].fill_(1e38) for f in "AB"]),
        f"Checkpoint {ADAPTER} has NaN or infinite weights in {UP}; …",
    ),
}

BASE_CASES = {
    "other sizes": Case(
        on_other_base(intermediate_size=64),
        f"Checkpoint {ADAPTER} was trained for another base: its factors for "
        "model.layers.0.mlp.down_proj make [32, 64], the base base has [32, 48].",
    ),
    "another folder": Case(
        adapter_settings(base_model_name_or_path="lora"),
        f"Checkpoint {ADAPTER} is an adapter for lora, not for the base_model base; if they are the "
        f"same model, write base+{ADAPTER}.",
    ),
    "base plus a model": Case(
        models("@base+@base"),
        "base+base needs an adapter after the +, but base has no adapter_config.json, or has "
        "complete weights too; give an adapter's folder.",
    ),
    "adapter on an adapter": Case(
        models(f"@lora/checkpoint-500+@{ADAPTER}"),
        "lora/checkpoint-500 is an adapter, but a complete model is needed here; …",
    ),
    "missing base": Case(
        models(f"@nowhere+@{ADAPTER}"),
        "The adapter's base nowhere does not exist (looked in …); correct the path in the recipe.",
    ),
    "glob of adapters without a match": Case(
        models("@base+@lora/step-*"),
        "models: base+lora/step-* matches no folder (looked in …); correct the pattern or …",
    ),
    "base_model with an adapter": Case(
        lambda family: family.recipe() | {"base_model": f"{family.base}+{family.root / ADAPTER}"},
        f"base_model: base+{ADAPTER} is an adapter on base, but deltas are measured against a "
        "complete model; write base_model: base.",
    ),
}


@each(WEIGHT_CASES | BASE_CASES)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


@each(VALUE_CASES)
@pytest.mark.parametrize("experts", [3, 5])
def test_values(case: Case, experts: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pass over the models and with two."""
    assert_case_refused(case, family, monkeypatch, num_experts=experts)


def test_nan_in_a_tensor_no_adapter_touches(family: Family) -> None:
    """Comparing adapters does not read the base: writing finds it."""
    for folder in family.checkpoints:
        shutil.rmtree(folder)
        save_adapter(family.base, folder, target_modules=["down_proj"])
    entry(BASE, UP, float("inf"))(family)
    recipe = family.write_recipe(family.recipe(parameters={"num_experts": 5}))
    result = run("upit-merge", recipe, family.root / "out")
    assert_refused(result, f"Checkpoint base has NaN or infinite weights in {UP}; …", family)
    assert not (family.root / "out").exists()


def test_tied_embeddings_that_are_replaced_together(tmp_path: Path) -> None:
    """As trainers save them when the vocabulary was looked at: twice the same table."""
    family = build_family(tmp_path, count=0, tie_word_embeddings=True)
    folder = tmp_path / "adapter"
    save_adapter(family.base, folder, target_modules=EVERYTHING)
    found = load_file(folder / "adapter_model.safetensors")
    table = torch.randn(259, 32)
    for name in ("model.embed_tokens", "lm_head"):
        found[f"base_model.model.{name}.weight"] = table.clone()
    save_file(found, folder / "adapter_model.safetensors")
    recipe = family.write_recipe(family.recipe(models=[str(folder)]))
    result = run("upit-merge", recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    moe = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(moe["model.embed_tokens.weight"], table)
