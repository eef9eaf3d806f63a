"""Colours of experts: text on them can be read, and no two experts look alike."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.support.contrast import contrast
from upit_merge.report.palette import (
    DARK,
    HEAT_STEPS,
    LIGHT,
    Look,
    Theme,
    css,
    degrees,
    displayed,
    heat,
    linear_rgb,
    num_hues,
    oklab,
    stylesheet,
)

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
COUNTS = pytest.mark.parametrize("count", [1, 2, 8, 16, 64])
# WCAG 2.2: text, and what is not text.
AA_TEXT, AA_OTHER = 4.5, 3.0


def test_contrast_is_wcag_s() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@THEMES
@COUNTS
def test_text_on_a_tint_can_be_read(theme: Theme, count: int) -> None:
    for hue in range(num_hues(count)):
        angle = degrees(hue, count)
        for tint in theme.tints:
            assert contrast(theme.ink, css(*tint, angle)) >= AA_TEXT
        line = css(*theme.line, angle)
        assert min(contrast(line, theme.paper), contrast(line, theme.panel)) >= AA_OTHER


@THEMES
def test_other_text_can_be_read(theme: Theme) -> None:
    for background in (theme.paper, theme.panel):
        for text in (theme.ink, theme.muted, theme.accent):
            assert contrast(text, background) >= AA_TEXT
    for step in range(HEAT_STEPS):
        assert contrast(theme.ink, css(*heat(theme, step))) >= AA_TEXT


@THEMES
@COUNTS
def test_experts_look_different(theme: Theme, count: int) -> None:
    """By a difference in OKLab that can be seen (0.02), or by the kind of line."""
    looks = [Look.of(expert, count) for expert in range(count)]
    assert len({(one.hue, one.line) for one in looks}) == count
    strongest = theme.tints[-1]
    places = [(oklab(*displayed(*strongest, degrees(one.hue, count))), one.line) for one in looks]
    for (one, line), (other, other_line) in itertools.combinations(places, 2):
        assert line != other_line or math.dist(one, other) > 0.02


@THEMES
def test_surer_is_stronger(theme: Theme) -> None:
    for hue in range(16):
        steps = [css(*tint, degrees(hue, 16)) for tint in theme.tints]
        away = [contrast(step, theme.paper) for step in steps]
        assert away == sorted(away)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((1.0, 0.0, 0.0), (1, 1, 1)),
        ((0.0, 0.0, 0.0), (0, 0, 0)),
        ((0.62796, 0.25768, 29.234), (1, 0, 0)),
        ((0.86644, 0.29483, 142.495), (0, 1, 0)),
        ((0.45201, 0.31321, 264.052), (0, 0, 1)),
    ],
)
def test_colours_are_css_s(colour: tuple[float, float, float], expected: object) -> None:
    """CSS Color 4's own values of the primaries."""
    assert linear_rgb(*colour) == pytest.approx(expected, abs=1e-3)


def test_a_stylesheet_is_small() -> None:
    assert len(stylesheet(256)) < 10_000
