"""Which part of the data is meant belongs to the data: other data has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import Family
from tests.support.commands import done, refused
from upit_merge.config.router import RouterSettings

OF_SET = {"data": "org/set", "subset": "small", "split": "validation"}


@pytest.mark.parametrize(
    ("data", "named", "expected"),
    [
        ("org/other", {}, ("org/other", None, "train")),
        ("org/other", {"split": "test"}, ("org/other", None, "test")),
        ("org/other", {"subset": "big"}, ("org/other", "big", "train")),
        ("./seed.jsonl", {}, ("./seed.jsonl", None, "train")),
        ("org/set", {}, ("org/set", "small", "validation")),
        ("org/set", {"split": "test"}, ("org/set", "small", "test")),
    ],
)
def test_other_data_has_its_own_parts(
    data: str, named: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    settings = RouterSettings(**OF_SET, sample=7).for_data(data, **named)
    assert (settings.data, settings.subset, settings.split) == expected
    assert settings.sample == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "org/other"], ("org/other", None, "train")),
        (["--data", "org/other", "--split", "test"], ("org/other", None, "test")),
        (["--data", "org/other", "--subset", "big"], ("org/other", "big", "train")),
        (["--data", "org/set"], ("org/set", "small", "validation")),
        ([], ("org/set", "small", "validation")),
    ],
)
def test_plan_asks_for_what_is_there(
    family: Family, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: tuple[Any, ...]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, **_: Any) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "abcabc" * (1 + i % 3)} for i in range(12)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    recipe = family.write_recipe(family.recipe(router=OF_SET))
    done("plan", recipe, "--quiet", *words)
    assert asked == [expected]


@pytest.mark.parametrize("option", ["--subset", "--split"])
def test_a_part_of_no_data(family: Family, option: str) -> None:
    recipe: Path = family.write_recipe(family.recipe(router=OF_SET))
    sentence = f"{option} is of the data; name that with --data."
    assert refused("plan", recipe, option, "other") == sentence
