"""How a recipe names models: folders, patterns in the order of steps, adapters on a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from tests.support.recipes import document
from tests.support.spoilt import refusal
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.references import expand_models
from upit_merge.io.hub import OpenOptions, resolve, split_reference


def expanded(*models: str) -> list[str]:
    entries = parse_recipe(document(models=[{"model": model} for model in models])).models
    return [entry.model for entry in expand_models(entries)]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-90", "best"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    (tmp_path / "sft" / "checkpoint-7.txt").touch()


@pytest.mark.usefixtures("steps")
def test_globs_give_folders_in_step_order() -> None:
    steps = [f"sft/checkpoint-{step}" for step in (90, 500, 1000, 1500)]
    assert expanded("sft/checkpoint-*") == steps
    assert expanded("sft/checkpoint-?000", "sft/best") == ["sft/checkpoint-1000", "sft/best"]
    assert expanded("org/model", "**/checkpoint-[59]*") == [
        "org/model",
        "sft/checkpoint-90",
        "sft/checkpoint-500",
    ]


@pytest.mark.usefixtures("steps")
def test_an_entry_s_parameters_hold_for_all_its_folders() -> None:
    models = [{"model": "sft/checkpoint-1*", "parameters": {"density": 0.3}}]
    entries = expand_models(parse_recipe(document(models=models)).models)
    assert [entry.parameters.density for entry in entries] == [0.3, 0.3]


@pytest.mark.usefixtures("steps")
def test_a_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    assert expanded("run[1]") == ["run[1]"]


@pytest.mark.usefixtures("steps")
def test_a_glob_without_a_match(tmp_path: Path) -> None:
    for pattern in ("sft/ckpt-*", "sft/*.txt"):
        message = refusal(expanded, "sft/best", pattern)
        assert message == (
            f"models: {pattern} matches no folder (looked in {tmp_path}); correct the pattern or "
            "the working directory."
        )


def test_globs_and_folders_with_a_plus(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a+b", "a+c", "lora/checkpoint-1000", "lora/checkpoint-500", "x+y/z+w"):
        (tmp_path / name).mkdir(parents=True)
    expected = ["base+lora/checkpoint-500", "base+lora/checkpoint-1000"]
    assert expanded("base+lora/checkpoint-*") == expected
    assert expanded("me/base@main+lora/checkpoint-*") == [
        name.replace("base+", "me/base@main+") for name in expected
    ]
    assert expanded("a+?") == ["a+b", "a+c"]
    assert expanded("a+b") == ["a+b"]
    assert split_reference("a+b") == ("a+b", None)
    assert split_reference("a+b+x+y") == ("a+b", "x+y")
    assert split_reference("a+b+x+y/z+w") == ("a+b", "x+y/z+w")
    assert split_reference("me/base+me/a+b") == ("me/base", "me/a+b")
    assert split_reference("me/base") == ("me/base", None)


def test_what_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything of a tokenizer, chat templates with names among it, and no other folder."""
    wanted = ["config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"]
    wanted += ["tekken.json", "spiece.model", "chat_template.jinja", "model.safetensors"]
    wanted += ["additional_chat_templates/tool_use.jinja", "generation_config.json"]
    others = ["onnx/config.json", "add/x.json", "a/x.json", "additional/x.json", "run.py"]
    others += ["additional_chat_templates2/x.json", "additional_chat_templates/x/y.json"]
    others += ["checkpoint-5/model.safetensors", "original/consolidated.safetensors", "x.bin"]
    asked: dict[str, Any] = {}

    def download(_repo: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("me/model", OpenOptions())
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted
