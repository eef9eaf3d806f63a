"""Colours of experts on a terminal: those of the page, to be read on any background."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from tests.support.contrast import contrast, hue
from upit_merge.report.palette import Look, stylesheet
from upit_merge.report.spoken import Screen
from upit_merge.report.terminal_palette import LINES, NAMED, Looks

SYSTEMS = ("truecolor", "256", "standard")
COUNTS = pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 12, 16, 32, 64])


def shown(count: int, system: str) -> list[str]:
    """What a terminal gets of a word of each expert: rich's codes before it."""
    file = io.StringIO()
    screen = Screen(file)
    screen.console = Console(
        file=file, force_terminal=True, color_system=system, no_color=False, highlight=False
    )
    for expert in range(count):
        screen.piece("word", expert, count)
    return re.findall(r"((?:\x1b\[[\d;]{2,}m|\[\d+\])+)word", file.getvalue())


def colours(codes: list[str]) -> list[str]:
    """Without underlines and italics."""
    return [re.sub(r"\b(3|4|21);", "", code) for code in codes]


def between(one: float, other: float) -> float:
    return abs((one - other + 180) % 360 - 180)


@COUNTS
def test_hues_are_the_page_s(count: int) -> None:
    """What the page's own style has for the line below the expert's text."""
    lines = dict(re.findall(r":root \.(u\d+)\{.*--line:(#\w+)\}", stylesheet(count)))
    for expert, code in enumerate(shown(count, "truecolor")):
        red, green, blue = map(int, re.search(r"38;2;(\d+);(\d+);(\d+)m", code).groups())  # type: ignore[union-attr]
        page = lines[Look.of(expert, count).classes.split()[0]]
        assert between(hue(f"#{red:02x}{green:02x}{blue:02x}"), hue(page)) < 2


@COUNTS
def test_it_can_be_read_on_white_and_on_black(count: int) -> None:
    """No colour has more than 4.58 on both; rounded to 256 colours, large text's 3 is left."""
    for style in Looks.of(count, "truecolor").styles:
        assert style.color is not None
        rounded = style.color.downgrade(ColorSystem.EIGHT_BIT).get_truecolor()
        for background in ("#ffffff", "#000000"):
            assert contrast(style.color.get_truecolor().hex, background) >= 4.2
            assert contrast(rounded.hex, background) >= 3


@COUNTS
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_two_experts_look_alike(count: int, system: str) -> None:
    codes = shown(count, system)
    assert len(set(codes)) == count
    assert ("[" in "".join(code.replace("\x1b[", "") for code in codes)) == (
        not Looks.of(count, system).are_distinct
    )
    if count <= 8:  # no underlines needed
        assert len(set(colours(codes))) == count
        assert colours(codes) == codes


def test_rich_s_own_sixteen_colours_would_not_do() -> None:
    """Why they are named: its nearest ones are the same for several of eight experts."""
    colours = [style.color for style in Looks.of(8, "truecolor").styles]
    nearest = {c.downgrade(ColorSystem.STANDARD).number for c in colours if c is not None}
    assert len(nearest) < 8


@pytest.mark.parametrize(
    ("count", "system", "expected"),
    [
        (64, "truecolor", True),
        (65, "truecolor", False),
        (32, "standard", True),
        (33, "standard", False),
        (32, "256", True),
        (65, "256", False),
        (4, "windows", True),
    ],
)
def test_more_than_can_be_told_apart_have_numbers(count: int, system: str, expected: bool) -> None:
    assert Looks.of(count, system).are_distinct == expected
    if system in SYSTEMS:
        numbered = ["[0]" in code for code in shown(count, system)[:1]]
        assert numbered == [not expected]


def test_kinds_of_lines_are_the_page_s() -> None:
    """On the page, too, the expert whose hue is there already has the next kind of line."""
    for expert, style in enumerate(Looks.of(64, "truecolor").styles):
        assert style.without_color == LINES[Look.of(expert, 64).line]


def test_named_colours_go_round_as_hues_do() -> None:
    """By the values that rich's usual theme has for them, from red on."""
    hues = [hue(Color.parse(name).get_truecolor(DEFAULT_TERMINAL_THEME).hex) for name in NAMED]
    steps = [(b - a + 10) % 360 - 10 for a, b in itertools.pairwise([*hues, hues[0]])]
    assert all(step > -1 for step in steps)
    assert sum(steps) == pytest.approx(360)
    for expert, angle in enumerate(hues):
        assert between(angle, 25 + 45 * expert) < 45
