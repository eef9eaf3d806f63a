"""The routing heat map: which expert gets which kind of text (paper, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upit_merge.errors import UpitError
from upit_merge.report.figures import drawable, figure, matrix_image, thinned

_MOST_GROUPS = 60  # in a picture; the table and the JSON file have all
_MOST_NUMBERS = 96  # cells with the share written into them
_FORMATS = (".png", ".pdf", ".svg", ".jpg")


def check_format(path: Path) -> None:
    """Check, before the work, that a picture can be written after it.

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
    experts = len(by_layer[0])
    # Inches: of a few columns each has room for its number, of many not.
    left = max(2.2, min(0.75 * len(groups), 9.0))
    right = max(2.2, min(0.3 * len(by_layer), 4.5))
    height = max(2.4, min(0.36 * experts, 6.4))
    highest = max(max(shares) for shares in [*(shares for _, shares in groups), *by_layer])
    numbers = ".0%" if len(groups) <= 12 and len(groups) * experts <= _MOST_NUMBERS else ""
    try:
        with figure(path, left + right + 2.0, height + 1.4) as drawn:
            axes = drawn.subplots(1, 2, width_ratios=[left, right])
            shares = _rows([shares for _, shares in groups])
            matrix_image(axes[0], shares, 0, highest, numbers=numbers)
            names = drawable([name for name, _ in groups], "kind")
            thinned(axes[0].xaxis, names, most=30)
            axes[0].tick_params(axis="x", rotation=30)
            axes[0].set(title="by kind of text", ylabel="expert")
            image = matrix_image(axes[1], _rows(by_layer), 0, highest)
            thinned(axes[1].xaxis, [str(layer) for layer in range(len(by_layer))], most=12)
            axes[1].set(title="by layer, all text", xlabel="layer")
            for panel in axes:
                thinned(panel.yaxis, [str(expert) for expert in range(experts)], most=32)
            bar = drawn.colorbar(image, ax=axes, pad=0.02, format="{x:.0%}")
            bar.set_label("share of the routed places")
            bar.outline.set_visible(False)
            bar.ax.axhline(1 / experts, color="white", linewidth=1.5)
            bar.ax.set_ylim(0, highest)
            title = "Where the router sends the tokens (white line: an even share)"
            drawn.suptitle(title, fontsize=10)
    except (OSError, ValueError) as error:
        raise UpitError(
            f"The picture {path} cannot be written ({error}); choose another."
        ) from None


def _rows(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*columns, strict=True)]
