"""The routing heat map: which expert gets which kind of text (paper, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from upit_merge.errors import UpitError

_MOST_GROUPS = 60  # in a picture; the table and the JSON file have all
_FORMATS = (".png", ".pdf", ".svg", ".jpg")


def check_format(path: Path) -> None:
    """Refuse, before the work, a picture that could not be written after it.

    Raises:
        UpitError: the extension is not that of a picture.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UpitError(f"The picture {path} is none of {', '.join(_FORMATS)}; name it so.")


def draw_routing(
    path: Path,
    groups: Sequence[tuple[str, Sequence[float]]],
    by_layer: Sequence[Sequence[float]],
) -> None:
    """Write a picture: expert by group, mean over the layers, and expert by layer, all data.

    Args:
        path: Of the picture; its extension decides the format.
        groups: Name and every expert's share of the routed places, (num_experts,).
        by_layer: The same for all data, (num_layers, num_experts).

    Raises:
        UpitError: the picture cannot be written.
    """
    groups = groups[:_MOST_GROUPS]
    # Not pyplot, which would keep state and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    experts = len(by_layer[0])
    left, right = max(2.2, 0.75 * len(groups)), max(2.2, 0.32 * len(by_layer))
    height = max(2.4, 0.36 * experts)
    figure = Figure(figsize=(left + right + 2.6, height + 1.3), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, width_ratios=[left, right])
    highest = max(max(shares) for shares in [*(shares for _, shares in groups), *by_layer])
    names = [shorten(name, 24, placeholder="…").replace("$", r"\$") for name, _ in groups]
    _panel(axes[0], [shares for _, shares in groups], names, highest, numbers=len(groups) <= 12)
    axes[0].set(title="by kind of text", ylabel="expert")
    axes[0].tick_params(axis="x", rotation=30)
    layers = [str(layer) for layer in range(len(by_layer))]
    image = _panel(axes[1], by_layer, layers, highest, numbers=False)
    axes[1].set(title="by layer, all text", xlabel="layer")
    if len(layers) > 16:
        axes[1].set_xticks(range(0, len(layers), 4), layers[::4])
    bar = figure.colorbar(image, ax=axes, label="share of the routed places", pad=0.02)
    bar.ax.axhline(1 / experts, color="white", linewidth=1.5)
    bar.ax.set_ylim(0, highest)
    figure.suptitle("Where the router sends the tokens (white line: an even share)", fontsize=10)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UpitError(
            f"The picture {path} cannot be written ({error}); choose another."
        ) from None


def _panel(
    axes: Any,
    columns: Sequence[Sequence[float]],
    names: Sequence[str],
    highest: float,
    *,
    numbers: bool,
) -> Any:
    """One heat map, (experts, columns)."""
    values = [list(row) for row in zip(*columns, strict=True)]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(values)))
    if numbers:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if value < 0.6 * highest else "black"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    return image
