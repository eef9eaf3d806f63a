"""Colours of experts on a terminal: the hues that `inspect`'s page gives them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from rich.color import Color, ColorSystem
from rich.style import Style

from upit_merge.report.palette import Look, css, degrees, num_hues

# Lightness and most chroma (OKLCH). Nobody knows the background: of all lightnesses, this is where
# the hue that can be read worst has the largest contrast on both white and black, 4.2 : 1.
TEXT = (0.566, 0.16)
# Sixteen colours are the terminal's own, of which rich's nearest would be one for several experts:
# these are in the order of the page's hues, and none is pale. Not every theme has them so, but
# there bright red is the more orange one, bright magenta the more violet.
NAMED = (
    *("red", "bright_red", "yellow", "green"),
    *("cyan", "blue", "bright_magenta", "magenta"),
)
# Experts whose colour is the same are told apart by these.
LINES = tuple(map(Style.parse, ("", "underline", "underline2", "underline italic")))


@dataclass(frozen=True)
class Looks:
    """How the experts of a mixture look on a terminal.

    Attributes:
        styles: Of each expert's text.
        are_distinct: No two are the same.
    """

    styles: tuple[Style, ...]
    are_distinct: bool

    @classmethod
    @functools.cache
    def of(cls, num_experts: int, color_system: str) -> Looks:
        """Give experts their looks.

        Args:
            num_experts: All that there are: on the page, too, these give every expert its hue.
            color_system: What rich calls the terminal's: `truecolor`, `256`, `standard` (16
                colours) or `windows` (as many).
        """
        taken: Counter[Color] = Counter()
        styles = []
        for expert in range(num_experts):
            colour = _colour(Look.of(expert, num_experts).hue, num_experts, color_system)
            # Of the neighbours among many hues some are one where there are few colours.
            styles.append(LINES[taken[colour] % len(LINES)] + Style(color=colour))
            taken[colour] += 1
        return cls(tuple(styles), max(taken.values(), default=0) <= len(LINES))


def _colour(hue: int, num_experts: int, color_system: str) -> Color:
    """Return a hue's colour, one of those that the terminal has."""
    if color_system in ("standard", "windows"):
        hues = num_hues(num_experts)
        # Whose place among the names is nearest to that of the hue in its circle.
        return Color.parse(NAMED[(2 * hue * len(NAMED) + hues) // (2 * hues) % len(NAMED)])
    colour = Color.parse(css(*TEXT, degrees(hue, num_experts)))
    if color_system != "256":
        return colour
    # A style keeps the codes of the first console that prints it, so that it has to be exact.
    number = colour.downgrade(ColorSystem.EIGHT_BIT).number
    assert number is not None
    return Color.from_ansi(number)
