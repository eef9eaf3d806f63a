"""Every recipe of recipes/, run on tiny models laid out as it says; the output is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.commands import done, invoke
from tests.support.lora import save_adapter
from tests.support.naive import PROJECTIONS, load_model, unlike_copies
from upit_merge.config.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yml"))


def one_model(family: Family) -> None:
    shutil.copytree(family.checkpoints[-1], family.root / "model")


def domains(family: Family) -> None:
    for folder, domain in zip(family.checkpoints, ("code", "math", "wiki"), strict=True):
        shutil.copytree(folder, family.root / "experts" / domain)


def adapters(family: Family) -> None:
    for index, skill in enumerate(("code", "math", "wiki")):
        save_adapter(family.base, family.root / "adapters" / skill, seed=index)


# What a recipe's models: are, where they are not `./base` and `./sft/checkpoint-*`.
BUILDERS: dict[str, Callable[[Family], None]] = {
    "btx.yml": domains,
    "drop-upcycling.yml": one_model,
    "self-moe.yml": adapters,
    "sparse-upcycling.yml": one_model,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_run_on_models_laid_out_as_they_say(
    family: Family, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    family.seed_file(count=150)
    BUILDERS.get(path.name, lambda _family: None)(family)
    monkeypatch.chdir(family.root)
    result = invoke("run", path, "out", "--quiet")
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    parameters = load_recipe(path)[0].parameters
    assert model.config.num_local_experts == (parameters.num_experts or 3)
    tokenizer = AutoTokenizer.from_pretrained("out")
    prompt = tokenizer("sample 1:", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    assert model(**prompt).logits.isfinite().all()
    done("verify", "out", "--quiet")


def run_recipe_file(name: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    family.seed_file(count=150)
    BUILDERS[name](family)
    monkeypatch.chdir(family.root)
    path = next(path for path in RECIPES if path.name == name)
    done("run", path, "out", "--quiet")
    return family.root / "out"


@pytest.mark.parametrize("name", ["sparse-upcycling.yml", "drop-upcycling.yml"])
def test_upcycled_models_are_the_naive_ones(family: Family, monkeypatch, name: str) -> None:
    out = run_recipe_file(name, family, monkeypatch)
    assert unlike_copies(family, out, [len(family.checkpoints) - 1]) == []


def test_branch_train_mix_is_the_naive_one(family: Family, monkeypatch) -> None:
    """Experts as they are, to the bit; all else the mean of the models, in numpy."""
    written = load_model(run_recipe_file("btx.yml", family, monkeypatch))
    models = [load_model(family.root / "experts" / name) for name in ("code", "math", "wiki")]
    expected = {}
    for name, tensor in models[0].items():
        if ".mlp." not in name:
            mean = np.mean([model[name].double().numpy() for model in models], axis=0)
            torch.testing.assert_close(
                written[name].double(), torch.from_numpy(mean), rtol=2**-8, atol=0
            )
            assert written[name].dtype == torch.bfloat16
            continue
        layer, projection = name.split(".")[2], name.split(".")[4]
        for expert, model in enumerate(models):
            target = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            expected[f"{target}.{PROJECTIONS[projection]}.weight"] = model[name].bfloat16()
        assert tensor.dtype == torch.float32
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    gates = {name for name in written if name.endswith("gate.weight")}
    assert written.keys() - gates == expected.keys() | {n for n in models[0] if ".mlp." not in n}


def test_the_table_of_recipes_has_a_row_for_each() -> None:
    table = (RECIPES[0].parent / "README.md").read_text()
    for path in RECIPES:
        assert f"[{path.name}]({path.name})" in table


def test_the_sparse_upcycling_recipe_computes_what_the_dense_model_does(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_recipe_file("sparse-upcycling.yml", family, monkeypatch)
    ids = torch.arange(3, 40).unsqueeze(0)
    dense = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).float()
    moe = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
