"""The recorded session of docs/first-mixture.md: its commands are those of the script, and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import Family

pytest.importorskip("pty", reason="needs a terminal, of a kind that Windows has not")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "first-mixture.md").read_text(encoding="utf-8")


def load(name: str) -> Any:
    """A script as a module; `docs` is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = load("record")


def questions(text: str) -> list[str]:
    """What is asked, without the answer that is offered."""
    return [re.sub(r"\[.*", "", line) for line in text.splitlines() if re.search(r"\]:", line)]


def test_the_page_shows_the_scripts_commands_in_their_order() -> None:
    assert record.commands_of(PAGE) == [*record.SESSION]


def test_the_page_does_not_tell_where_it_was_recorded() -> None:
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users|opt)\b", PAGE)
    assert "\x1b" not in PAGE


def test_from_checkpoints_to_a_mixture_by_enter_alone(family: Family) -> None:
    """On a terminal, with the page's commands and answers."""
    family.seed_file(name="train.jsonl")
    asked = ""
    for command in ("init", "plan", "run"):
        line = next(line for line in record.SESSION if line.startswith(f"upit-merge {command} "))
        words = record.words_of(line)
        assert words[0] == sys.executable
        status, output = record.in_terminal(words, record.SESSION[line], family.root, limit=120)
        assert status == 0, output
        asked += output if command == "init" else ""
        assert str(family.root) not in output
    assert len(questions(asked)) == 3
    assert questions(asked)[:2] == questions(PAGE)[:2]
    recipe = yaml.safe_load((family.root / "recipe.yml").read_text())
    assert recipe["router"] == {"data": "./train.jsonl"}
    model = AutoModelForCausalLM.from_pretrained(family.root / "out")
    assert model.config.num_local_experts == recipe["parameters"]["num_experts"]


def test_recording_replaces_what_commands_print_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    page = "# A page\n\n```console\n$ ls\nold\n```\n\nText.\n"
    record.SESSION, session = {"ls": ()}, record.SESSION
    try:
        assert record.record(page, tmp_path) == page.replace("old", "'a file'")
    finally:
        record.SESSION = session


def test_a_screen_is_what_is_left_to_read() -> None:
    printed = b"\x1b[1mOne\x1b[0m\r\nwork:  50%|##  | 1/2\rwork: 100%|####| 2/2\r\nWho? [me]: "
    assert record.screen(printed) == "One\nWho? [me]: "
