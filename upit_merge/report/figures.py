"""The look of the pictures: no ground of their own, and ink that is read on light and on dark."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

# A page is shown in light or in dark, and only its reader knows. Contrast to white and to the dark
# pages of the Hub and of GitHub multiply to 18.8, so that 4.3 of each is the most there can be.
INK = "#797979"
ACCENT = "#1f6feb"
SECOND = "#bc4c00"

_DPI = 110
_STYLE = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "grid.color": INK,
    "grid.alpha": 0.3,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollars
    "xtick.color": INK,
    "ytick.color": INK,
}
# The last character of the font's Latin, Greek, Cyrillic, Armenian and Hebrew.
_LAST_DRAWABLE = "\u05ff"


@contextlib.contextmanager
def figure(path: Path, width: float, height: float, dpi: int = _DPI) -> Iterator[Any]:
    """Yield an empty figure to draw on, written to a file at the end.

    Nobody's own settings of matplotlib count, and no display is needed.

    Args:
        path: Its extension decides the format.
        width, height: Inches.

    Raises:
        OSError, ValueError: the file cannot be written.
    """
    # Not pyplot, which would keep state and ask for a display.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        drawn = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
        FigureCanvasAgg(drawn)
        yield drawn
        _save(drawn, path)


def _save(drawn: Any, path: Path) -> None:
    kind = path.suffix.lower()
    drawn.savefig(
        path,
        # A JPEG has no transparent parts, which would be black.
        facecolor="white" if kind in (".jpg", ".jpeg") else "none",
        pil_kwargs={"optimize": True} if kind == ".png" else None,
    )


def drawable(names: Sequence[str], otherwise: str, length: int = 24) -> list[str]:
    """Return names as they can be drawn: short, and numbered where the font lacks the characters.

    Args:
        otherwise: What a name is replaced by, before its number.
    """
    return [
        shorten(name, length, placeholder="…")
        if name.strip() and max(name) <= _LAST_DRAWABLE
        else f"{otherwise} {index}"
        for index, name in enumerate(names)
    ]


def matrix_image(
    axes: Any, values: Sequence[Sequence[float]], low: float, high: float, *, numbers: str = ""
) -> Any:
    """Draw a matrix as colours, rows downwards.

    Args:
        low, high: Values of the first and the last colour.
        numbers: Format in which the values are written into the cells; none if empty.
    """
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if numbers:
        middle = low + 0.6 * (high - low)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if value < middle else "black"
                text = format(value, numbers)
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
    return image


def thinned(axis: Any, names: Sequence[str], most: int = 20) -> None:
    """Label an axis of whole numbers, every so many if there are more than `most`."""
    step = -(-len(names) // most)
    axis.set_ticks(range(0, len(names), step), names[::step])
