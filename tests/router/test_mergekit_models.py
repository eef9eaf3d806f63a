"""The recipes that are printed for mergekit, of LoRA adapters: tried with mergekit itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import Family, build_family, train_on
from tests.support.commands import done
from tests.support.lora import FFN, opened_inputs, save_adapter
from tests.support.naive import load_model
from upit_merge.commands.rivals import Rivals
from upit_merge.report.markdown import without_local_paths
from upit_merge.router.mergekit_models import MergekitModels, mergekit_recipe
from upit_merge.router.worth import Rival, Worth

SUMS = torch.ones(96, dtype=torch.float64)
AVERAGE = Rival("average", "the average", SUMS)
SUM = Rival("sum", "a sum", SUMS, {"scale": 0.7})


def written(recipe: str, folder: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of a recipe, called as the recipe's first line says."""
    folder.mkdir()
    (folder / "recipe.yml").write_text(recipe)
    words = [str(folder / "recipe.yml"), str(folder / "out"), "--quiet"]
    if "--lora-merge-cache FOLDER --lora-merge-dtype float32" in recipe:
        words += ["--lora-merge-cache", str(folder / "merged"), "--lora-merge-dtype", "float32"]
    mergekit_yaml.main(words, standalone_mode=False)
    return load_model(folder / "out")


def recipe_of(rival: Rival, document: dict[str, Any]) -> tuple[str | None, MergekitModels]:
    with opened_inputs(document) as inputs:
        named = MergekitModels.of(inputs.base, inputs.checkpoints)
        return mergekit_recipe(rival, named, inputs.dtype), named


@pytest.mark.parametrize("rival", [AVERAGE, SUM], ids=["linear", "task_arithmetic"])
@pytest.mark.parametrize("named", ["alone", "BASE+ADAPTER", "odd names"])
def test_adapters_are_named_as_mergekit_opens_them(
    named: str, rival: Rival, tmp_path: Path
) -> None:
    family = build_family(tmp_path / ("a+b@c" if named == "odd names" else "plain"), count=0)
    folders = [family.root / "sft" / name for name in ("arith", "prose")]
    models = [save_adapter(family.base, folder, seed=i) for i, folder in enumerate(folders)]
    entries = [str(folder) for folder in folders]
    if named == "BASE+ADAPTER":
        entries = [f"{family.base}+{entry}" for entry in entries]
    recipe, _ = recipe_of(rival, family.recipe(models=entries))
    assert recipe is not None
    base = load_model(family.base)
    for name, found in written(recipe, tmp_path / "made").items():
        own = [model[name] for model in models]
        wanted = (own[0] + own[1]) / 2
        if rival is SUM:
            wanted = base[name] + 0.7 * (own[0] + own[1] - 2 * base[name])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert str(tmp_path) not in without_local_paths(recipe)


def test_what_an_adapter_adds_is_not_rounded_before_it_is_summed(tmp_path: Path) -> None:
    family = build_family(tmp_path, count=0)
    model = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.bfloat16)
    model.save_pretrained(family.base)
    models = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(models):
        save_adapter(family.base, folder, seed=seed)
    recipe, _ = recipe_of(AVERAGE, family.recipe(models=[*map(str, models)], dtype="float32"))
    assert recipe is not None
    found = written(recipe, tmp_path / "made")
    name = "model.layers.0.mlp.up_proj.weight"
    with opened_inputs(family.recipe(models=[*map(str, models)])) as inputs:
        wanted = sum(model.tensor(name) for model in inputs.checkpoints) / 2
    torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-7)


def test_a_mixed_recipe_and_one_without_adapters(tmp_path: Path) -> None:
    family = build_family(tmp_path, count=1)
    adapter = tmp_path / "adapter"
    save_adapter(family.base, adapter)
    recipe, _ = recipe_of(AVERAGE, family.recipe())
    assert recipe is not None
    assert "#" not in recipe
    both = [str(family.checkpoints[0]), str(adapter)]
    recipe, _ = recipe_of(AVERAGE, family.recipe(models=both))
    assert recipe is not None
    named = [model["model"] for model in yaml.safe_load(recipe)["models"]]
    assert named == [both[0], f"{family.base}+{adapter}"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": [*FFN, "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_own_head_is_nothing_for_mergekit(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """It takes the base's configuration, which says that there is none."""
    family = build_family(tmp_path, count=0, tie_word_embeddings=tied)
    save_adapter(family.base, tmp_path / "adapter", **settings)
    recipe, named = recipe_of(AVERAGE, family.recipe(models=[str(tmp_path / "adapter")]))
    assert (recipe is None) == tied
    assert named.unfit.startswith("Checkpoint 0 is an adapter whose head is no longer") == tied
    assert "merge_and_unload" in named.unfit or not tied
    assert str(tmp_path) not in named.unfit


def test_another_vocabulary_is_nothing_for_mergekit(tmp_path: Path) -> None:
    family = build_family(tmp_path, count=0)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    model.resize_token_embeddings(320)
    settings = LoraConfig(r=2, target_modules=FFN, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    recipe, named = recipe_of(SUM, family.recipe(models=[str(tmp_path / "adapter")]))
    assert recipe is None
    assert "another vocabulary than its base" in named.unfit


@pytest.mark.parametrize("unfit", ["", "Checkpoint 0 is odd."])
def test_what_is_kept_of_them_is_the_same_again(unfit: str) -> None:
    rivals = Rivals([AVERAGE], "", MergekitModels("base", ["a", {"model": 1}], True, unfit))
    worth = Worth.of(
        SUMS * 2, SUMS, rivals.models, bytes_ours=2, bytes_dense=1, ours_kind="mixture"
    )
    tensors, facts = rivals.to_kept()
    again = Rivals.of_kept(tensors, json.loads(json.dumps(facts)))
    assert again.sources == rivals.sources
    assert Rivals.of_kept(*Rivals([AVERAGE]).to_kept()).sources is None
    assert worth.outcome == "not_worth"
    assert rivals.no_recipe(worth) == unfit
    assert (rivals.recipe(worth) is None) == bool(unfit)


@pytest.mark.parametrize("tied", [False, True])
def test_plan_says_how_or_why_not(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that are the same model with other noise each: their average is better than any."""
    # That the base is better still is not what is looked at here.
    monkeypatch.setattr("upit_merge.router.rivals._scale_on", lambda *_: 0.2)
    family = build_family(tmp_path, count=0, tie_word_embeddings=tied)
    train_on(family, {"trained": "abcdefgh" * 9})
    family = Family(tmp_path, tmp_path / "trained", [])
    models = [str(tmp_path / name) for name in ("one", "two", "three")]
    for seed, folder in enumerate(models):
        save_adapter(family.base, Path(folder), seed=seed, r=16, modules_to_save=["lm_head"])
    data = tmp_path / "seed.jsonl"
    lines = [json.dumps({"text": ("abcdefgh" * 9)[i % 8 : i % 8 + 30 + i // 8]}) for i in range(96)]
    data.write_text("\n".join(lines) + "\n")
    recipe = family.write_recipe(family.recipe(models=models))
    told = done("plan", recipe, "--data", data, "--quiet").output
    assert "Not worth it: " in told, told
    assert ("is an adapter whose head" in " ".join(told.split())) == tied
    assert (f"model: {family.base}+{models[0]}" in told) != tied
