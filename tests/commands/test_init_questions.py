"""`upit-merge init` on a terminal: what it asks, and that Enter takes what was found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.support.folders import models, write_data
from tests.support.spoilt import snapshot
from upit_merge.cli.main import main
from upit_merge.commands import init


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of click's tests is none; on a real one: tests/docs/test_first_mixture.py."""
    monkeypatch.setattr(init, "is_terminal", lambda: True)


def typed(*lines: str, words: tuple[str, ...] = (".",)) -> Result:
    return CliRunner().invoke(main, ["init", *words], input="".join(f"{line}\n" for line in lines))


def recipe() -> dict[str, Any]:
    return yaml.safe_load(Path("recipe.yml").read_text(encoding="utf-8"))


def test_enter_takes_what_was_found(here: Path) -> None:
    write_data("seed.jsonl")
    result = typed("", "", "")
    assert result.exit_code == 0, result.output
    by_questions = Path("recipe.yml").read_bytes()
    Path("recipe.yml").unlink()
    assert CliRunner().invoke(main, ["init", ".", "--yes"]).exit_code == 0
    assert Path("recipe.yml").read_bytes() == by_questions
    lines = result.output.splitlines()
    table = next(n for n, line in enumerate(lines) if "What lies in" in line)
    asked = [n for n, line in enumerate(lines) if line.endswith(("]: ", "]:"))]
    assert len(asked) == 3
    assert table < asked[0]
    assert "[./base]" in lines[asked[0]]
    assert "[./seed.jsonl]" in lines[asked[1]]
    assert "[4]" in lines[asked[2]]


def test_answers_win(here: Path) -> None:
    write_data("seed.jsonl", "other.jsonl")
    shutil.copytree("base", "llama")
    assert typed("./llama", "other.jsonl", "3").exit_code == 0
    document = recipe()
    assert document["base_model"] == "./llama"
    assert document["router"] == {"data": "other.jsonl"}
    assert document["parameters"]["num_experts"] == 3


def test_what_is_said_beforehand_is_not_asked(here: Path) -> None:
    words = (".", "--base", "./base", "--no-data", "--experts", "3")
    result = typed(words=words)
    assert result.exit_code == 0, result.output
    assert "]:" not in result.output


def test_a_wrong_answer_is_told_and_asked_again(here: Path) -> None:
    result = typed("./nowhere", "", "no.jsonl", "-", "none", "3")
    assert result.exit_code == 0, result.output
    assert "The base_model ./nowhere does not exist" in result.output
    assert "There is no data at 'no.jsonl'" in result.output
    assert "router" not in recipe()


def test_a_base_that_nothing_names_is_asked_for_and_is_then_no_expert(here: Path) -> None:
    for old, new in (("base", "llama"), ("sft/checkpoint-500", "code")):
        Path(old).rename(new)
    Path("sft/checkpoint-1000").rename("math")
    shutil.rmtree("sft")
    result = typed("llama", "-", "")
    assert result.exit_code == 0, result.output
    assert recipe()["base_model"] == "llama"
    assert models(recipe()) == ["./code", "./math"]


def test_several_data_files_are_named(here: Path) -> None:
    write_data("a.jsonl", "b.jsonl")
    result = typed("", "b.jsonl", "")
    assert "Data here: ./a.jsonl, ./b.jsonl." in result.output
    assert recipe()["router"] == {"data": "b.jsonl"}


@pytest.mark.parametrize("lines", [[], ["n"], [""]])
def test_a_recipe_that_is_there_is_replaced_only_after_a_yes(here: Path, lines: list[str]) -> None:
    Path("recipe.yml").write_text("mine")
    result = typed(*lines)
    assert result.exit_code == 1
    assert Path("recipe.yml").read_text() == "mine"
    assert typed("y", "", "", "").exit_code == 0
    assert recipe()["base_model"] == "./base"


def test_whoever_leaves_in_between_has_written_nothing(here: Path) -> None:
    before = snapshot(here)
    assert typed("").exit_code == 1  # and then Ctrl-D
    assert snapshot(here) == before
