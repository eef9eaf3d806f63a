"""`upit-merge init` where no recipe can be written, or the folder is a stranger's: a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.commands import done, refused
from tests.support.folders import models, write_data, written
from tests.support.spoilt import snapshot
from upit_merge.commands.first_recipe import survey

# ---- what is refused ---------------------------------------------------------------------------


def test_a_recipe_that_is_there_stays(here: Path) -> None:
    Path("recipe.yml").write_text("mine")
    assert refused("init", ".") == (
        "recipe.yml is there already; give another --output, or pass --force to replace it."
    )
    assert refused("init", ".", "--yes").startswith("recipe.yml is there already")
    assert Path("recipe.yml").read_text() == "mine"
    done("init", ".", "--output", "new/second.yml")
    assert Path("new/second.yml").is_file()
    done("init", ".", "--force")
    assert yaml.safe_load(Path("recipe.yml").read_text())["merge_method"] == "upit"
    assert refused("init", ".", "--output", "sft") == (
        "sft is a folder; give the name of a file as --output."
    )


def only(*names: str) -> Any:
    """Leave only these of what lies there."""

    def spoil(here: Path) -> None:
        for path in here.iterdir():
            if path.name not in names:
                shutil.rmtree(path)

    return spoil


def gguf(here: Path) -> None:
    only()(here)
    (here / "small.Q4_K_M.gguf").write_bytes(b"GGUF")


def optimizers(here: Path) -> None:
    only("sft")(here)
    for folder in (here / "sft").iterdir():
        for path in folder.iterdir():
            path.unlink()
        (folder / "optimizer.pt").touch()


def deepspeed(here: Path) -> None:
    optimizers(here)
    for folder in (here / "sft").iterdir():
        (folder / "zero_to_fp32.py").touch()
        (folder / "global_step500").mkdir()


def other_family(here: Path) -> None:
    for path in here.rglob("config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma2"}))


def misfit(here: Path) -> None:
    path = here / "sft/checkpoint-1000/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


SENTENCES: dict[str, tuple[Any, tuple[object, ...], str]] = {
    "nothing": (
        only(),
        (),
        ". holds no checkpoints: no folder with model.safetensors or adapter_model.safetensors; "
        "give the folder in which your trainer saved them.",
    ),
    "a base alone": (
        only("base"),
        (),
        ". holds one model (./base) and no checkpoints trained from it; give the folder in which "
        "your trainer saved them.",
    ),
    "one checkpoint": (
        lambda here: [shutil.rmtree(here / f"sft/checkpoint-{n}") for n in (500, 1000)],
        (),
        "There is one checkpoint only (./sft/checkpoint-1500), and experts are grown from at least "
        "two; add more, or copy the one model, as recipes/sparse-upcycling.yml does.",
    ),
    "a GGUF": (
        gguf,
        (),
        "The checkpoint ./small.Q4_K_M.gguf is a GGUF, made to be run and not to be merged; write "
        "it out as a dense model first, as docs/troubleshooting.md shows under GGUF.",
    ),
    "optimizers alone": (
        optimizers,
        (),
        "Checkpoint ./sft/checkpoint-500 has no config.json in sft/checkpoint-500; give the folder "
        "of a complete Hugging Face checkpoint.",
    ),
    "DeepSpeed's shards": (
        deepspeed,
        (),
        "The checkpoint ./sft/checkpoint-500 has its weights in DeepSpeed's shards; join them by "
        "DeepSpeed's own zero_to_fp32.py: `python -m deepspeed.utils.zero_to_fp32 "
        "./sft/checkpoint-500 ./sft/checkpoint-500 --safe_serialization`.",
    ),
    "no folder": (
        lambda here: None,
        ("nowhere",),
        "nowhere does not exist; give the folder in which the checkpoints lie, or its parent.",
    ),
    "a file": (
        lambda here: None,
        ("base/config.json",),
        "base/config.json is a file; give the folder in which the checkpoints lie, or its parent.",
    ),
    "a base that is not there": (
        lambda here: None,
        (".", "--base", "./no"),
        "The base_model ./no does not exist (looked in HERE); correct the path in the recipe.",
    ),
    "an adapter for the base": (
        lambda here: None,
        (".", "--base", "base+sft"),
        "base+sft is an adapter on base; the base is that model alone.",
    ),
    "a glob that matches nothing": (
        lambda here: None,
        (".", "--model", "runs/*"),
        "models: runs/* matches no folder (looked in HERE); correct the pattern or the working "
        "directory.",
    ),
    "data that is not there": (
        lambda here: None,
        (".", "--data", "no.jsonl"),
        "There is no data at 'no.jsonl'; give the path of a .jsonl, .json, .parquet, .csv, "
        ".tsv or .txt file or of a folder of them, or a dataset id.",
    ),
    "too many experts for a token": (
        lambda here: None,
        (".", "--experts", 3, "--experts-per-token", 4),
        "recipe.yml: parameters: num_experts (3) is below experts_per_token (4), but a token "
        "cannot be routed to more experts than there are; lower experts_per_token or raise "
        "num_experts.",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_no_recipe_can_be_written_for(here: Path, case: str) -> None:
    spoil, words, sentence = SENTENCES[case]
    spoil(here)
    before = snapshot(here)
    told = refused("init", *(words or (".",)), "--quiet")
    assert told == sentence.replace("HERE", str(Path.cwd()))
    assert snapshot(here) == before


@pytest.mark.parametrize("spoil", [other_family, misfit])
def test_what_plan_refuses_is_refused_with_the_same_sentence(here: Path, spoil: Any) -> None:
    done("init", ".")
    spoil(here)
    sentence = refused("plan", "recipe.yml", "--quiet")
    Path("recipe.yml").unlink()
    assert refused("init", ".", "--quiet") == sentence
    assert not Path("recipe.yml").exists()


def test_a_mixture_is_no_checkpoint(here: Path) -> None:
    write_data("seed.jsonl")
    done("init", ".", "--quiet")
    done("run", "recipe.yml", "out", "--quiet")
    output = done("init", ".", "--force").output
    assert (
        output.splitlines()[-1] == "  make it                      upit-merge run recipe.yml out-2/"
    )
    assert "out is a mixture that upit-merge made" in output
    assert models(yaml.safe_load(Path("recipe.yml").read_text())) == ["./sft/checkpoint-*"]
    assert refused("init", "out", "--force").endswith(
        "is a mixture that upit-merge made; give the checkpoints of dense models."
    )


def test_two_data_files_that_could_both_be_meant(here: Path) -> None:
    write_data("a.jsonl", "b.jsonl")
    assert refused("init", ".", "--quiet") == (
        ". holds 2 data files (./a.jsonl, ./b.jsonl); say which one the router is fitted to with "
        "--data, or --no-data."
    )
    assert written(".", "--yes")["router"] == {"data": "./a.jsonl"}
    assert written(".", "--data", "b.jsonl")["router"] == {"data": "b.jsonl"}


def test_pickles_are_read_when_that_is_allowed(here: Path) -> None:
    for folder in [here / "base", *(here / "sft").iterdir()]:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert "pass --lazy-unpickle" in refused("init", ".", "--quiet")
    assert models(written(".", "--lazy-unpickle")) == ["./sft/checkpoint-*"]


def test_models_may_be_named(here: Path) -> None:
    document = written(".", "--model", "sft/checkpoint-500", "--model", "./sft/checkpoint-1000")
    assert models(document) == ["sft/checkpoint-500", "./sft/checkpoint-1000"]
    assert document["parameters"]["backbone"] == "average"
    document = written(".", "--model", "sft/checkpoint-*", "--yes")
    assert models(document) == ["sft/checkpoint-*"]
    assert "backbone" not in document["parameters"]


# ---- folders of strangers ----------------------------------------------------------------------


def test_links_are_not_followed(here: Path) -> None:
    shutil.copytree("base", here.parent / "secret")
    os.symlink("..", "sft/loop")
    os.symlink("sft", "again")
    os.symlink("sft/checkpoint-1500", "sft/last")
    os.symlink(here.parent / "secret", "pretrained")
    (here.parent / "seed.jsonl").write_text('{"text": "secret"}\n')
    os.symlink(here.parent / "seed.jsonl", "seed.jsonl")
    output = done("init", ".").output
    document = yaml.safe_load(Path("recipe.yml").read_text())
    assert (document["base_model"], models(document)) == ("./base", ["./sft/checkpoint-*"])
    assert "router" not in document
    assert "./pretrained is a link out of the folder; name it with --base or --model." in output
    assert "./seed.jsonl is a link out of the folder; name it with --data." in output


def test_a_folder_without_end_is_looked_at_to_a_limit(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deep = here / "/".join("abcdefgh")
    deep.mkdir(parents=True)
    shutil.copytree("sft", deep / "sft")
    assert models(written(".")) == ["./sft/checkpoint-*"]
    Path("zzz").mkdir()
    for number in range(300):
        Path(f"zzz/{number}").touch()
    monkeypatch.setattr(survey, "_MAX_ENTRIES", 100)
    assert models(written(".")) == ["./sft/checkpoint-*"]
    assert "holds more than 100 files and folders" in caplog.text


def test_hints_that_are_no_text_are_passed_over(here: Path) -> None:
    os.mkfifo("sft/README.md")
    Path("sft/a.yml").write_bytes(b"\xff\xfe")
    Path("sft/b.yml").write_text("a: &a [*a]\nmodel_name_or_path: [1]\n")
    os.symlink("/etc/passwd", "sft/c.yml")
    Path("sft/d.yml").write_text("- 1\n")
    assert written(".")["base_model"] == "./base"
