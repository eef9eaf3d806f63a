"""What merge keys (`<<`) mean in a recipe, whatever PyYAML makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from upit_merge.config.yaml_file import parse_yaml
from upit_merge.errors import UpitError

# `x` of each text is what is looked at.
FIRST = "first: &first {density: 0.1, seed: 1}\n"
SECOND = "second: &second {density: 0.2, weight: 2}\n"
BOTH = FIRST + SECOND
MEANINGS: dict[str, tuple[str, dict[Any, Any]]] = {
    "one source": (FIRST + "x: {<<: *first}", {"density": 0.1, "seed": 1}),
    "a list of one": (FIRST + "x: {<<: [*first]}", {"density": 0.1, "seed": 1}),
    "of several the first wins": (
        BOTH + "x: {<<: [*first, *second]}",
        {"density": 0.1, "seed": 1, "weight": 2},
    ),
    "the other way round": (
        BOTH + "x: {<<: [*second, *first]}",
        {"density": 0.2, "seed": 1, "weight": 2},
    ),
    "keys of one letter": (
        "x: {<<: [{a: 1, b: 1}, {b: 2, c: 2}, {c: 3, d: 3}]}",
        {"a": 1, "b": 1, "c": 2, "d": 3},
    ),
    "of three the first": (
        BOTH + "x: {<<: [{density: 0.3}, *first, *second]}",
        {"density": 0.3, "seed": 1, "weight": 2},
    ),
    "the same twice": (FIRST + "x: {<<: [*first, *first]}", {"density": 0.1, "seed": 1}),
    "own key before": (FIRST + "x: {density: 0.9, <<: *first}", {"density": 0.9, "seed": 1}),
    "own key after": (FIRST + "x: {<<: *first, density: 0.9}", {"density": 0.9, "seed": 1}),
    "own keys around a list": (
        BOTH + "x: {seed: 9, <<: [*first, *second], weight: 8}",
        {"seed": 9, "density": 0.1, "weight": 8},
    ),
    "own null": (FIRST + "x: {<<: *first, density: null}", {"density": None, "seed": 1}),
    "not deeply": (
        "a: &a {inner: {one: 1, two: 2}}\nx: {<<: *a, inner: {one: 3}}",
        {"inner": {"one": 3}},
    ),
    "written in place": ("x: {<<: {density: 0.1}, seed: 2}", {"density": 0.1, "seed": 2}),
    "in place in place": (
        "x: {<<: {<<: {density: 0.1, seed: 1}, density: 0.2}, weight: 3}",
        {"density": 0.2, "seed": 1, "weight": 3},
    ),
    "a source that merges": (
        FIRST + "child: &child {<<: *first, density: 0.5}\nx: {<<: *child, seed: 7}",
        {"density": 0.5, "seed": 7},
    ),
    "sources that merge": (
        BOTH + "one: &one {<<: *second, steps: 1}\nx: {<<: [*one, *first]}",
        {"density": 0.2, "weight": 2, "steps": 1, "seed": 1},
    ),
    "a source that is merged twice": (
        FIRST + "one: &one {<<: *first, seed: 4}\nother: {<<: *one}\nx: {<<: *one}",
        {"density": 0.1, "seed": 4},
    ),
    "nothing": ("x: {<<: {}, density: 0.1}", {"density": 0.1}),
    "no sources": ("x: {<<: [], density: 0.1}", {"density": 0.1}),
    "lists and aliases as values": (
        "list: &list [1, 2]\na: &a {density: *list}\nx: {<<: *a, seed: *list}",
        {"density": [1, 2], "seed": [1, 2]},
    ),
    "equal numbers, unlike texts": ("x: {<<: {0x10: one}, 16: other}", {16: "other"}),
    "block style": (
        "a: &a\n  density: 0.1\nb: &b\n  density: 0.2\nx:\n  seed: 1\n  <<:\n  - *a\n  - *b\n",
        {"seed": 1, "density": 0.1},
    ),
    "a plain equals sign": ("x: {<<: {=: 1}, seed: 2}", {"=": 1, "seed": 2}),
    "a quoted merge key": ("x: {'<<': 1}", {"<<": 1}),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_meaning(case: str) -> None:
    text, expected = MEANINGS[case]
    assert parse_yaml(text, "r")["x"] == expected


def test_merged_keys_come_first() -> None:
    text = "x: {seed: 1, <<: [{density: 0.1}, {weight: 2}], steps: 3}"
    assert [*parse_yaml(text, "r")["x"]] == ["weight", "density", "seed", "steps"]


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("x: {<<: 1}", "line 1, column 9", "`<<` takes a mapping or a list of mappings, not a sin"),
        ("x:\n  <<:\n", "line 2, column 6", "`<<` takes a mapping or a list of mappings, not a si"),
        ("x: {<<: [{}, 1]}", "line 1, column 14", "`<<` takes a mapping or a list of mappings, no"),
        ("x: {<<: [[{}]]}", "line 1, column 10", "`<<` takes a mapping or a list of mappings, not"),
        ("x: &a {<<: *a}", "line 1, column 8", "a mapping merges (`<<`) itself"),
        ("x: &a {<<: {<<: *a}}", "line 1, column 13", "a mapping merges (`<<`) itself"),
        ("x: &a {<<: {b: &b {<<: [*b]}}}", "line 1, column 20", "a mapping merges (`<<`) itself"),
        ("a: &a {b: 1}\nx: {<<: *a, <<: *a}", "line 2, column 13", "the key << is given twice"),
        ("x: {<<: {seed: 1}, a: 1, a: 2}", "line 1, column 26", "the key a is given twice"),
        ("x: {<<: {a: 1, a: 2}}", "line 1, column 16", "the key a is given twice"),
        (
            "x: {<<: {[1]: 2}}",
            "line 1, column 10",
            "while constructing a mapping, found unhashable",
        ),
    ],
)
def test_refusals(text: str, where: str, problem: str) -> None:
    with pytest.raises(UpitError) as caught:
        parse_yaml(text, "r")
    assert caught.value.message.startswith(f"r is not valid YAML ({where}: {problem}")
    assert caught.value.message.endswith("; correct the file.")


def test_how_much_is_merged() -> None:
    """Ten thousand keys are, one more is not; the author's own do not count."""
    names = ", ".join(f"k{n}: 1" for n in range(100))
    text = f"a: &a {{{names}}}\nx: {{own: 1, <<: [{', '.join(['*a'] * 100)}]}}"
    assert len(parse_yaml(text, "r")["x"]) == 101
    with pytest.raises(UpitError, match=r"line 2, column 13: merge keys \(`<<`\) copy too much"):
        parse_yaml(text.replace("]", ", {k: 1}]"), "r")
