"""`upit-merge init`: the recipe for what lies in a folder is the one a person would write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.commands import done, refused
from tests.support.folders import models, write_adapters, write_data, written
from upit_merge.config.recipe import load_recipe, parse_recipe
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened

# ---- what is found ---------------------------------------------------------------------------


def test_a_run_beside_its_base_and_data(here: Path) -> None:
    write_data("seed.jsonl")
    output = done("init", ".").output
    assert yaml.safe_load(Path("recipe.yml").read_text()) == {
        "merge_method": "upit",
        "base_model": "./base",
        "models": [{"model": "./sft/checkpoint-*"}],
        "dtype": "float32",
        "parameters": {"num_experts": 4, "density": 0.9, "seed": 42},
        "router": {"data": "./seed.jsonl"},
    }
    assert "upit-merge split ./seed.jsonl" in output
    assert output.splitlines()[-4:] == [
        "Next:",
        "  see what it makes and needs  upit-merge plan recipe.yml out/",
        "  see whether it is worth it   upit-merge plan recipe.yml --data ./seed.jsonl",
        "  make it                      upit-merge run recipe.yml out/",
    ]


def test_the_commands_run_from_where_init_did(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the tree is given, and from wherever."""
    assert models(written(".")) == ["./sft/checkpoint-*"]
    assert models(written("sft", "--base", "base")) == ["./sft/checkpoint-*"]
    assert models(written(here)) == ["./sft/checkpoint-*"]
    monkeypatch.chdir(here / "base")
    document = written("..")
    assert (document["base_model"], models(document)) == ("../base", ["../sft/checkpoint-*"])
    Path(here.parent / "other").mkdir()
    monkeypatch.chdir(here.parent / "other")
    document = written(here)
    assert document["base_model"] == str(here / "base")
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        assert len(inputs.checkpoints) == 3


def test_the_written_recipe_runs(here: Path) -> None:
    write_data("seed.jsonl")
    done("init", ".", "--experts", 3)
    assert "Output: " in done("plan", "recipe.yml", "out/", "--quiet").output
    done("run", "recipe.yml", "out/", "--quiet")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_local_experts == 3


def test_without_data_the_router_is_left_out_and_that_is_told(here: Path) -> None:
    output = done("init", ".").output
    assert "the gates will be random until they are trained" in output
    text = Path("recipe.yml").read_text()
    assert "router" not in yaml.safe_load(text)
    assert "# router:\n#   data: ./seed.jsonl\n" in text
    with_router = text.replace("# router:\n#   data:", "router:\n  data:")
    assert yaml.safe_load(with_router)["router"] == {"data": "./seed.jsonl"}
    write_data("seed.jsonl")
    Path("recipe.yml").unlink()
    assert "router" not in written(".", "--no-data")


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["one.jsonl"], "./one.jsonl"),
        (["other.jsonl", "train.jsonl"], "./train.jsonl"),
        (["train.jsonl", "data/seed.jsonl"], "./data/seed.jsonl"),
        (["sft/train.jsonl"], "./sft/train.jsonl"),
        (["data/one.jsonl", "two.jsonl"], "./two.jsonl"),
        (["train.jsonl", "held-out.jsonl", "test.jsonl", "eval/data.jsonl"], "./train.jsonl"),
        (["held-out.jsonl"], None),
        (["requirements.txt", "notes.txt"], None),
        (["train.txt"], "./train.txt"),
        (["sft/checkpoint-500/train.jsonl"], None),
        ([".hidden.jsonl"], None),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "./data",
        ),
    ],
)
def test_which_data(here: Path, files: list[str], taken: str | None) -> None:
    write_data(*files)
    assert written(".").get("router") == (None if taken is None else {"data": taken})


def test_files_without_samples_are_no_data(here: Path) -> None:
    Path("train.jsonl").write_text('{"loss": 1.5}\n')
    Path("seed.json").write_text("{")
    Path("results.csv").write_text("step,loss\n1,2\n")
    os.mkfifo("seed.jsonl")
    assert "router" not in written(".")


def test_a_half_finished_checkpoint_is_left_out(here: Path) -> None:
    weights = Path("sft/checkpoint-1500/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    output = done("init", ".").output
    assert "sft/checkpoint-1500" in output
    assert models(yaml.safe_load(Path("recipe.yml").read_text())) == [
        "./sft/checkpoint-500",
        "./sft/checkpoint-1000",
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (
            [p.unlink() for p in folder.iterdir()]
            and [(folder / n).touch() for n in ("optimizer.pt", "trainer_state.json")]
        ),
        lambda folder: (
            (folder / "model.safetensors").unlink() or (folder / "pytorch_model_fsdp_0").mkdir()
        ),
        lambda folder: (folder / "config.json").write_text("{"),
    ],
)
def test_a_folder_that_is_no_model_yet_is_left_out(here: Path, spoil: Any) -> None:
    spoil(here / "sft/checkpoint-1000")
    assert models(written(".")) == ["./sft/checkpoint-500", "./sft/checkpoint-1500"]


def test_checkpoints_come_in_step_order(here: Path) -> None:
    for old, new in ((500, 20), (1000, 100), (1500, 3)):
        Path(f"sft/checkpoint-{old}").rename(f"sft/checkpoint-{new}")
    shutil.copytree("sft/checkpoint-3", "sft/checkpoint-4-broken")
    Path("sft/checkpoint-4-broken/model.safetensors").unlink()
    assert models(written(".")) == [f"./sft/checkpoint-{step}" for step in (3, 20, 100)]
    shutil.rmtree("sft/checkpoint-4-broken")
    assert models(written(".")) == ["./sft/checkpoint-*"]


def test_several_runs_share_the_mean_of_their_attention(here: Path) -> None:
    Path("runs").mkdir()
    for run in ("code", "math"):
        shutil.copytree("sft", f"runs/{run}")
    shutil.rmtree("sft")
    document = written(".")
    assert models(document) == ["./runs/code/checkpoint-*", "./runs/math/checkpoint-*"]
    assert document["parameters"] == {
        "num_experts": 6,
        "experts_per_token": 2,
        "backbone": "average",
        "seed": 42,
    }


def test_what_a_run_ended_with_is_no_expert_and_no_base(here: Path) -> None:
    for name in os.listdir("sft/checkpoint-1500"):
        shutil.copy(f"sft/checkpoint-1500/{name}", "sft")
    document = written(".")
    assert (document["base_model"], models(document)) == ("./base", ["./sft/checkpoint-*"])
    Path("base").rename("qwen")
    assert written(".")["base_model"] == "./qwen"


def test_models_that_were_trained_apart(here: Path) -> None:
    for old, new in ((500, "code"), (1000, "math"), (1500, "chat")):
        Path(f"sft/checkpoint-{old}").rename(new)
    document = written(".")
    assert document["base_model"] == "./base"
    assert models(document) == ["./chat", "./code", "./math"]
    assert document["parameters"]["num_experts"] == 3
    Path("base").rename("llama")
    assert refused("init", ".").endswith("name it with --base, a folder or a Hub id.")
    assert models(written(".", "--base", "llama")) == ["./chat", "./code", "./math"]


def test_many_checkpoints_make_the_recipes_number_of_experts(here: Path) -> None:
    for step in range(2000, 5000, 500):
        shutil.copytree("sft/checkpoint-500", f"sft/checkpoint-{step}")
    document = written(".")
    assert document["parameters"]["num_experts"] == 8
    assert models(document) == ["./sft/checkpoint-*"]
    assert written(".", "--experts", 5, "--experts-per-token", 1)["parameters"] == {
        "num_experts": 5,
        "experts_per_token": 1,
        "seed": 42,
    }


def test_the_dtype_is_that_of_the_checkpoints(tmp_path: Path, monkeypatch: Any) -> None:
    build_family(tmp_path, dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    assert written(".")["dtype"] == "bfloat16"
    assert written(".", "--dtype", "float16")["dtype"] == "float16"


# ---- whose checkpoints they are ----------------------------------------------------------------


def test_adapters_say_what_they_are_of(here: Path) -> None:
    shutil.rmtree("sft")
    Path("base").rename("llama-3")
    write_adapters(Path("llama-3"), "lora/checkpoint-500", "lora/checkpoint-1000")
    document = written(".")
    assert (document["base_model"], models(document)) == ("./llama-3", ["./lora/checkpoint-*"])
    assert document["dtype"] == "float32"
    write_adapters(Path("llama-3"), *(f"lora/{n}" for n in ("law", "art")), named="/gone/llama-3")
    shutil.rmtree("lora/checkpoint-500")
    shutil.rmtree("lora/checkpoint-1000")
    document = written(".")
    assert (document["base_model"], models(document)) == ("./llama-3", ["./lora/art", "./lora/law"])


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("owner/llama", "owner/llama"),
        ("owner/llama-unsloth-bnb-4bit", "owner/llama"),
        ("/root/.cache/huggingface/hub/models--owner--llama/snapshots/0a1b", "owner/llama"),
    ],
)
def test_a_base_on_the_hub_is_named_and_not_downloaded(here: Path, named: str, base: str) -> None:
    write_adapters(Path("base"), "lora/checkpoint-500", "lora/checkpoint-1000", named=named)
    document = written("lora")
    assert document["base_model"] == base
    assert "dtype" not in document


def test_a_base_beside_wins_over_a_name_of_the_hub(here: Path) -> None:
    shutil.rmtree("sft")
    write_adapters(Path("base"), "lora/checkpoint-5", "lora/checkpoint-10", named="owner/llama")
    assert written(".")["base_model"] == "./base"
    Path("base").rename("Llama")
    assert written(".")["base_model"] == "./Llama"
    Path("Llama").rename("other")
    assert written(".")["base_model"] == "owner/llama"


def test_a_base_beside_the_folder_is_found_by_its_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written("sft")["base_model"] == "./base"
    assert written(here / "sft")["base_model"] == "./base"
    monkeypatch.chdir("sft")
    document = written(".")
    assert (document["base_model"], models(document)) == ("../base", ["./checkpoint-*"])
    monkeypatch.chdir(here)
    shutil.copytree("base", "old-base")
    assert "name it with --base" in refused("init", "sft")
    shutil.rmtree("old-base")
    config = Path("base/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    assert "name it with --base" in refused("init", "sft")


def test_a_base_that_is_nowhere_must_be_named(here: Path) -> None:
    Path("base").rename("other")
    write_adapters(Path("other"), "lora/checkpoint-5", "lora/checkpoint-10", named="/gone/llama")
    assert refused("init", "lora") == (
        "Nothing says which model the checkpoints in lora were trained from (adapter_config.json "
        "of ./lora/checkpoint-5 names /gone/llama, which is not here); name it with --base, a "
        "folder or a Hub id."
    )
    assert written("lora", "--base", "./other")["base_model"] == "./other"


def test_a_base_that_the_settings_or_the_card_of_a_run_name(here: Path) -> None:
    shutil.rmtree("base")
    Path("sft.yml").write_text("model_name_or_path: owner/llama\noutput_dir: ./sft\n")
    Path("other.yml").write_text("model_name_or_path: owner/other\noutput_dir: ./other\n")
    assert written(".")["base_model"] == "owner/llama"
    Path("sft.yml").unlink()
    Path("sft/README.md").write_text("---\nbase_model: owner/from-card\n---\n# A run\n")
    assert written(".")["base_model"] == "owner/from-card"
    Path("sft/checkpoint-500/README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n")
    assert written(".")["base_model"] == "owner/from-card"


def test_a_run_that_was_begun_again_names_no_base(here: Path) -> None:
    """transformers 4 wrote where a model was loaded from into its config.json."""
    shutil.rmtree("base")
    for step in (1000, 1500):
        path = Path(f"sft/checkpoint-{step}/config.json")
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"_name_or_path": "sft/checkpoint-500"})
        )
    assert "name it with --base" in refused("init", ".")


# ---- what recipes must survive -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a: b #c", 'it\'s "quoted"', "[x] *", "größe", "a+b", "- no", "yes", "{{x}}", "50%"]
)
def test_any_name_of_a_folder_is_quoted(here: Path, name: str) -> None:
    Path(name).mkdir()
    for part in ("base", "sft"):
        Path(part).rename(Path(name, part))
    write_data(f"{name}/seed.jsonl")
    done("init", ".")
    recipe, _text = load_recipe(Path("recipe.yml"))
    assert recipe.base_model == f"./{name}/base"
    assert recipe.router is not None
    assert recipe.router.data == f"./{name}/seed.jsonl"
    with opened(recipe, OpenOptions()) as inputs:
        folders = [model.folder.resolve() for model in inputs.checkpoints]
    assert folders == [(here / name / f"sft/checkpoint-{n}").resolve() for n in (500, 1000, 1500)]


def test_a_name_of_control_characters_is_refused_or_left_out(here: Path) -> None:
    Path("sft/checkpoint-1500").rename("sft/check\x1b[2Jpoint")
    shutil.copytree("sft", "s\nft")
    output = done("init", ".").output
    assert "\x1b" not in output
    assert models(yaml.safe_load(Path("recipe.yml").read_text())) == ["./sft/checkpoint-*"]
