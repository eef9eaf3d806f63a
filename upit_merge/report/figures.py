"""The look of the pictures: dark ink on an opaque light ground, readable on any page."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

# A page is shown in light or in dark: a picture that brings its own background fits both.
BACKGROUND = "#f6f8fa"
PANEL = "#ffffff"
INK = "#24292f"
FAINT = "#59636e"
ACCENT = "#0550ae"
SECOND = "#bc4c00"

_DPI = 110
_STYLE = {
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "axes.facecolor": PANEL,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "grid.color": "#d8dee4",
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
        if path.suffix.lower() == ".png":
            _save_png(path, drawn)
        else:
            drawn.savefig(path)


def _save_png(path: Path, drawn: Any) -> None:
    """Save with a palette, which makes the file a third as large; nothing of it is transparent."""
    from PIL import Image

    drawn.canvas.draw()
    size = drawn.canvas.get_width_height()
    pixels = Image.frombuffer("RGBA", size, drawn.canvas.buffer_rgba()).convert("RGB")
    # Of Pillow's palettes the one whose steps are even from the first to the last colour.
    pixels.quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


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
