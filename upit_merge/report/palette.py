"""Colours of experts: made in OKLCH, so that all are equally light, and text on them is readable."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Experts whose hue is the same are told apart by the line below the text.
LINES = ("solid", "dashed", "dotted", "double")
MOST_HUES = 16
# Of a token's tint: how much of the scores its expert has, from "no more than the others".
STEPS = 5

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Theme:
    """Lightness and chroma (OKLCH) of one appearance of the page.

    Attributes:
        paper, panel: Backgrounds, as #rrggbb.
        ink, muted: Text, and text that says less.
        edge, accent: Thin lines, and what is chosen or in focus.
        tints: Lightness and most chroma behind a token, by `STEPS`.
        line: Lightness and most chroma of what underlines a token.
        heat: Lightness and chroma of the least and the most in a table.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    edge: str
    accent: str
    tints: tuple[tuple[float, float], ...]
    line: tuple[float, float]
    heat: tuple[tuple[float, float], tuple[float, float]]


LIGHT = Theme(
    paper="#fcfbf8",
    panel="#ffffff",
    ink="#1d1b22",
    muted="#5b5766",
    edge="#dedae4",
    accent="#4a3aa8",
    tints=((0.965, 0.02), (0.94, 0.04), (0.91, 0.06), (0.88, 0.085), (0.84, 0.11)),
    line=(0.58, 0.16),
    heat=((0.985, 0.005), (0.74, 0.13)),
)
DARK = Theme(
    paper="#15141a",
    panel="#1d1c24",
    ink="#eceaf2",
    muted="#a9a5b6",
    edge="#383543",
    accent="#b5a8ff",
    tints=((0.245, 0.025), (0.28, 0.045), (0.325, 0.065), (0.37, 0.085), (0.42, 0.1)),
    line=(0.74, 0.14),
    heat=((0.23, 0.012), (0.48, 0.13)),
)
HEAT_HUE = 290.0
HEAT_STEPS = 11


@dataclass(frozen=True)
class Look:
    """How the tokens of an expert look.

    Attributes:
        hue: Number of its hue.
        line: Number of the kind of line below the text, in `LINES`.
    """

    hue: int
    line: int

    @classmethod
    def of(cls, expert: int, num_experts: int) -> Look:
        hues = num_hues(num_experts)
        return cls(expert % hues, expert // hues % len(LINES))

    @property
    def classes(self) -> str:
        """Those of the stylesheet."""
        return f"u{self.hue} k{self.line}" if self.line else f"u{self.hue}"


def num_hues(num_experts: int) -> int:
    return min(num_experts, MOST_HUES)


def degrees(hue: int, num_experts: int) -> float:
    """Return a hue by its number, in degrees."""
    return (25 + 360 * hue / num_hues(num_experts)) % 360


def heat(theme: Theme, step: int) -> tuple[float, float, float]:
    """Return lightness, chroma and hue of a table's cell, `step` of `HEAT_STEPS`."""
    (least, pale), (most, rich) = theme.heat
    share = step / (HEAT_STEPS - 1)
    return least + (most - least) * share, pale + (rich - pale) * share, HEAT_HUE


def oklab(lightness: float, chroma: float, hue: float) -> Rgb:
    """Return the place of a colour in OKLab, where distances are what people see."""
    angle = math.radians(hue)
    return lightness, chroma * math.cos(angle), chroma * math.sin(angle)


def linear_rgb(lightness: float, chroma: float, hue: float) -> Rgb:
    """Return linear sRGB of an OKLCH colour (Ottosson's matrices); outside of 0 … 1 no screen has it."""
    light, a, b = oklab(lightness, chroma, hue)
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def displayed(lightness: float, chroma: float, hue: float) -> Rgb:
    """Return an OKLCH colour with as much of its chroma as a screen has at that lightness."""
    least, most = 0.0, chroma
    for _ in range(20):
        tried = (least + most) / 2 if most > least else chroma
        fits = all(-1e-6 <= value <= 1 + 1e-6 for value in linear_rgb(lightness, tried, hue))
        least, most = (tried, most) if fits else (least, tried)
    return lightness, least, hue


def css(lightness: float, chroma: float, hue: float) -> str:
    """Return a colour as #rrggbb, see `displayed`."""
    parts = []
    lightness, chroma, hue = displayed(lightness, chroma, hue)
    for value in linear_rgb(lightness, chroma, hue):
        value = min(1.0, max(0.0, value))
        encoded = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        parts.append(f"{round(255 * encoded):02x}")
    return "#" + "".join(parts)


def _rules(theme: Theme, root: str, num_experts: int) -> str:
    """Return what is special to one appearance: variables of the page, and those of every hue."""
    names = ("paper", "panel", "ink", "muted", "edge", "accent")
    found = [f"--{name}:{getattr(theme, name)}" for name in names]
    found += [f"--h{step}:{css(*heat(theme, step))}" for step in range(HEAT_STEPS)]
    scheme = "light" if theme is LIGHT else "dark"
    rules = [f"{root}{{color-scheme:{scheme};{';'.join(found)}}}"]
    for hue in range(num_hues(num_experts)):
        angle = degrees(hue, num_experts)
        tints = [f"--t{step}:{css(*tint, angle)}" for step, tint in enumerate(theme.tints)]
        rules.append(f"{root} .u{hue}{{{';'.join(tints)};--line:{css(*theme.line, angle)}}}")
    return "\n".join(rules)


def stylesheet(num_experts: int) -> str:
    """Return CSS: variables of both appearances, a class for each hue, line, step and heat."""
    rules = [
        _rules(LIGHT, ":root", num_experts),
        f"@media (prefers-color-scheme:dark){{"
        f"{_rules(DARK, ':root:not([data-theme=light])', num_experts)}}}",
        _rules(DARK, ":root[data-theme=dark]", num_experts),
    ]
    rules += [f".k{line}{{--kind:{kind}}}" for line, kind in enumerate(LINES) if line]
    rules += [f".c{step}{{--tint:var(--t{step})}}" for step in range(STEPS)]
    rules += [f".h{step}{{background:var(--h{step})}}" for step in range(HEAT_STEPS)]
    return "\n".join(rules)
