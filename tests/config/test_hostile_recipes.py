"""Hostile input: recipes made to exhaust their reader, or to run code."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.support.spoilt import assert_sentence, refusal
from upit_merge.config.recipe import load_recipe, parse_recipe, parse_recipe_text
from upit_merge.errors import UpitError


def laughs(leaf: str, levels: int = 9) -> str:
    """A list of nine lists of nine lists …: a line of text, 9 ** levels values."""
    text = f"&a0 [{', '.join([leaf] * 9)}]"
    for level in range(1, levels):
        text = f"&a{level} [{text}{f', *a{level - 1}' * 8}]"
    return text


def merged(levels: int) -> str:
    """The same with merge keys, which the YAML library itself copies."""
    first = "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(9)) + "}"
    sources = (f"[{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels))
    return (
        "{"
        + ", ".join([first, *(f"a{n}: &a{n} {{<<: {s}}}" for n, s in enumerate(sources, 1))])
        + "}"
    )


# A thousand keys eleven times over. PyYAML 6.0.4 merges what an alias names only once, so the bomb
# above is none there; what the sources hold is counted all the same.
MANY_MERGED = f"{{a: &a {{{', '.join(f'k{n}: 1' for n in range(1000))}}}, b: {{<<: [{', '.join(['*a'] * 11)}]}}}}"
HEAD = "merge_method: upit\nbase_model: b\n"
RECIPE = f"{HEAD}models: [{{model: m}}]\n"
PLACES = {
    "all": "{}",
    "key": f"{RECIPE}? {{}}\n: 1",
    "method": "merge_method: {}",
    "models": f"{HEAD}models: {{}}",
    "density": f"{RECIPE}parameters:\n  density: {{}}",
    "router": f"{RECIPE}router: {{}}",
    "unknown": f"{RECIPE}unknown: {{}}",
}
BOMBS = {
    "laughs": laughs("0.5"),
    "entries": laughs("{model: m}"),
    "texts": laughs('"' + "x" * 2000 + '"', 6),
    "merge keys": merged(9),
    "endless list": "&a [*a]",
    "endless mapping": "&a {data: *a, density: *a}",
    "endless merge": "&a {<<: *a, data: x}",
    "both ways": "&a {x: &b [*a, *a], y: *b}",
    "huge number": "0x" + "f" * 50_000,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str, place: str) -> None:
    started = time.process_time()
    message = refusal(parse_recipe_text, PLACES[place].replace("{}", BOMBS[bomb]))
    assert time.process_time() - started < 2
    assert len(message) < 400


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_no_memory(bomb: str) -> None:
    """Wherever they lie, the same walk finds them; watching the memory makes it slow."""
    tracemalloc.start()
    refusal(parse_recipe_text, PLACES["models"].replace("{}", BOMBS[bomb]))
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            RECIPE + "x: &a [*a]",
            "r is too large with its aliases (`*name`) written out; repeat less.",
        ),
        (RECIPE + "x: 0x1" + "0" * 99, "r holds a number of 397 bits; correct it."),
        (
            HEAD.replace("b\n", '"\\ud83d"\n'),
            "r holds '\\ud83d', half of a character; correct the text it is in.",
        ),
        (
            RECIPE + f"x: {MANY_MERGED}",
            "r is not valid YAML (line 4, column 8907: merge keys (`<<`) copy too much); correct …",
        ),
        (
            "#" * 250_001,
            "r has more than 250,000 characters; give a recipe, such as recipes/upit-8x.yml.",
        ),
        ("[" * 250_000, "r is not valid YAML (maximum recursion depth exceeded…"),
        (
            "x: !!bool maybe",
            "r is not valid YAML (a value does not fit its tag); correct the file.",
        ),
        (RECIPE + '"a\\e[2J": 1', "r: unknown key a\\x1b[2J (known here: …"),
        (
            HEAD + 'models: [model: "a\\nb"]',
            "r: models.0.model is 'a\\nb', expected a text without line ends or other control …",
        ),
    ],
)
def test_what_is_told_of_a_bomb(text: str, sentence: str) -> None:
    assert_sentence(refusal(parse_recipe_text, text, "r"), sentence)


def test_a_bomb_from_mergekit() -> None:
    """mergekit parses the YAML itself and hands over objects that share their parts."""
    bomb: Any = [0.5] * 9
    for _ in range(9):
        bomb = [bomb] * 9
    endless: list[Any] = []
    endless.append(endless)
    for density in (bomb, endless):
        document = {
            "merge_method": "upit",
            "base_model": "b",
            "models": [{"model": "m"}],
            "parameters": {"density": density},
        }
        with pytest.raises(UpitError, match="too large with its aliases"):
            parse_recipe(document)


def test_aliases_in_moderation() -> None:
    """Anchors, aliases and merge keys are YAML's to use, also where they override."""
    text = """
        merge_method: upit
        base_model: b
        models:
        - {model: one, parameters: &own {density: &d [0.5, 0.9]}}
        - {model: two, parameters: {<<: *own}}
        - {model: three, parameters: {<<: [*own], density: 0.7}}
        parameters: {density: *d}
    """
    recipe = parse_recipe_text(text)
    assert [entry.parameters.density for entry in recipe.models] == [[0.5, 0.9], [0.5, 0.9], 0.7]
    assert recipe.parameters.density == [0.5, 0.9]


def test_an_override_that_is_merged_before_it_is_built() -> None:
    """The key given twice here comes from the merge, not from the author."""
    text = "{p: {q: {r: &b {<<: {k: 1}, k: 2}}}, z: {<<: *b}}"
    with pytest.raises(UpitError, match="merge_method is missing"):
        parse_recipe_text(text)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]",
        "!!python/object/new:os.system ['touch executed']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch executed']",
    ],
)
@pytest.mark.parametrize("place", ["all", "models", "density", "router"])
def test_tags_do_not_run(
    place: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UpitError, match="could not determine a constructor for the tag"):
        parse_recipe_text(PLACES[place].replace("{}", value))
    assert not list(tmp_path.iterdir())


def test_an_endless_recipe() -> None:
    tracemalloc.start()
    with pytest.raises(UpitError, match="has more than 250,000 characters"):
        load_recipe(Path("/dev/zero"))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
