"""The experts' family tree: where each is drawn, and the picture itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upit_merge.report.document import Lineage, Report
from upit_merge.report.figures import INK, drawable, figure

_SHARE_SHOWN = 0.005  # of a checkpoint in an expert: what a pie or a line can show
_BESIDE = 0.11  # how far from its line a share is written, in radii of about a third
_MOST_LABELLED = 24  # lines that have their share written beside them


@dataclass(frozen=True)
class Node:
    """An expert, or a checkpoint that is none.

    Attributes:
        label: Its number, or a checkpoint's name.
        column: Its generation; checkpoints are 0.
        height: From 0 at the bottom to 1 at the top.
        weights: Share of every checkpoint in it; sums to 1.
    """

    label: str
    column: int
    height: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Link:
    """Leads from an ancestor to its descendant: indices of nodes, and the ancestor's share."""

    ancestor: int
    descendant: int
    share: float


@dataclass(frozen=True)
class Tree:
    """Has the nodes in the order of checkpoints, then experts, and the links between them."""

    nodes: Sequence[Node]
    links: Sequence[Link]

    @property
    def columns(self) -> int:
        """Count the generations."""
        return 1 + max(node.column for node in self.nodes)

    @property
    def tallest(self) -> int:
        """Count the nodes of the longest column."""
        sizes = [0] * self.columns
        for node in self.nodes:
            sizes[node.column] += 1
        return max(sizes)


def has_tree(report: Report) -> bool:
    """Tell whether some expert is neither a checkpoint nor a copy of one."""
    return any(expert.checkpoint is None for expert in report.lineage.experts)


def family_tree(lineage: Lineage, names: Sequence[str]) -> Tree:
    """Lay out who descends from whom, generation by generation.

    A child is linked to its parents; one that has other parents in other layers, and an average,
    to the checkpoints it has shares of.

    Args:
        names: Of the checkpoints.
    """
    m = len(names)
    # Nodes: the checkpoints first, then every expert that is not one of them.
    node_of: dict[int, int] = {}
    labels = list(names)
    weights = [tuple(float(i == own) for i in range(m)) for own in range(m)]
    columns, links = [0] * m, []
    for index, expert in enumerate(lineage.experts):
        if expert.checkpoint is not None:
            node_of[index] = expert.checkpoint
            labels[expert.checkpoint] = f"{index}  {names[expert.checkpoint]}"
            continue
        node = node_of[index] = len(labels)
        if expert.parents is not None and expert.alpha is not None:
            shares = (expert.alpha, 1 - expert.alpha)
            found = list(zip((node_of[parent] for parent in expert.parents), shares, strict=True))
        else:
            found = [(i, share) for i, share in enumerate(expert.weights) if share > _SHARE_SHOWN]
        labels.append(str(index))
        weights.append(tuple(expert.weights))
        columns.append(1 + max((columns[ancestor] for ancestor, _ in found), default=0))
        links += [Link(ancestor, node, share) for ancestor, share in found]
    heights = _heights(columns, links)
    nodes = [Node(*parts) for parts in zip(labels, columns, heights, weights, strict=True)]
    return Tree(nodes, links)


def _heights(columns: Sequence[int], links: Sequence[Link]) -> list[float]:
    """Place checkpoints at equal distances, the first on top, others near to their ancestors."""
    ancestors: dict[int, list[Link]] = {}
    for link in links:
        ancestors.setdefault(link.descendant, []).append(link)
    sizes = [columns.count(column) for column in range(1 + max(columns))]
    gap, heights = 1 / max(sizes), [0.0] * len(columns)
    for column in range(len(sizes)):
        members = [node for node, own in enumerate(columns) if own == column]
        if column == 0:
            wanted = {node: 1 - (place + 0.5) / len(members) for place, node in enumerate(members)}
        else:
            wanted = {n: sum(heights[a.ancestor] * a.share for a in ancestors[n]) for n in members}
        for node, height in _apart(wanted, gap).items():
            heights[node] = height
    return heights


def _apart(wanted: Mapping[int, float], gap: float) -> dict[int, float]:
    """Return heights near the wanted ones, `gap` or more apart, within half a gap of 0 and 1."""
    order = sorted(wanted, key=lambda node: (wanted[node], node))
    found: list[float] = []
    for place, node in enumerate(order):  # upwards: none nearer than a gap to the one below
        lowest = found[-1] + gap if found else gap / 2
        found.append(max(lowest, min(wanted[node], 1 - gap / 2 - gap * (len(order) - 1 - place))))
    # Whoever was pushed up takes along those below it as far as they were pushed, by half.
    for place in range(len(order) - 2, -1, -1):
        slack = found[place + 1] - gap - found[place]
        lift = (found[place + 1] - wanted[order[place + 1]]) / 2
        if lift > 0:
            found[place] += min(slack, lift)
    return dict(zip(order, found, strict=True))


def draw_family_tree(path: Path, report: Report) -> None:
    """Write the picture: generations from left to right, every expert a pie of its checkpoints."""
    names = drawable([source.name for source in report.sources.checkpoints], "checkpoint", 20)
    tree = family_tree(report.lineage, names)
    # Inches: of many experts each has less room, and a number keeps clear of the next pie.
    row = max(0.17, min(0.46, 7.4 / tree.tallest))
    height = row * max(3, tree.tallest)
    left, right, step = 1.75, 0.55, min(1.7, 7.4 / (tree.columns - 1))
    width = left + right + step * (tree.columns - 1)
    with figure(path, width, height + 0.4) as drawn:
        axes = drawn.subplots()
        axes.set_axis_off()
        drawn.suptitle("Family tree of the experts", fontsize=10)
        places = [(node.column * step, node.height * height) for node in tree.nodes]
        colors = checkpoint_colors(len(names))
        radius = 0.36 * row
        _draw_links(axes, tree, places, radius, colors)
        for node, place in zip(tree.nodes, places, strict=True):
            _draw_pie(axes, place, radius, node.weights, colors)
            _draw_label(axes, node, place, radius, size=8 if row > 0.2 else 6.5)
        axes.set(xlim=(-left, width - left), ylim=(0, height), aspect="equal")


def checkpoint_colors(count: int) -> list[Any]:
    """Return a colour per checkpoint, in the order of training; none too light or dark to be seen."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.2 + 0.62 * i / max(1, count - 1)) for i in range(count)]


def _draw_links(
    axes: Any,
    tree: Tree,
    places: Sequence[tuple[float, float]],
    radius: float,
    colors: Sequence[Any],
) -> None:
    """Draw a line per link, as wide as the share and of the colour of the ancestor's largest part."""
    labelled = len(tree.links) <= _MOST_LABELLED
    earlier: set[int] = set()
    for link in tree.links:
        (x0, y0), (x1, y1) = places[link.ancestor], places[link.descendant]
        weights = tree.nodes[link.ancestor].weights
        axes.plot(
            (x0, x1),
            (y0, y1),
            color=colors[weights.index(max(weights))],
            alpha=0.6 if labelled else 0.4,
            linewidth=0.5 + 2.2 * link.share,
            zorder=1,
        )
        if labelled:
            # The second of two that may run close to each other is written farther away.
            away = radius + (0.52 if link.descendant in earlier else 0.28)
            earlier.add(link.descendant)
            near = 1 - away / math.hypot(x1 - x0, y1 - y0)
            # Beside its line: the page is the ground, so that nothing can hide the line behind it.
            length = math.hypot(x1 - x0, y1 - y0)
            beside = -_BESIDE if away > radius + 0.3 else _BESIDE
            aside = (-beside * (y1 - y0) / length, beside * (x1 - x0) / length)
            at = (x0 + (x1 - x0) * near + aside[0], y0 + (y1 - y0) * near + aside[1])
            _write(axes, at, _percent(link.share), size=6.5, align="center", order=2)


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else ">99%" if share > 0.995 else f"{share:.0%}"


def _write(
    axes: Any,
    place: tuple[float, float],
    text: str,
    *,
    size: float,
    align: str,
    order: int,
) -> None:
    axes.text(*place, text, ha=align, va="center", fontsize=size, color=INK, zorder=order)


def _draw_pie(
    axes: Any,
    place: tuple[float, float],
    radius: float,
    weights: Sequence[float],
    colors: Sequence[Any],
) -> None:
    from matplotlib.patches import Circle, Wedge

    start = 90.0
    for share, color in zip(weights, colors, strict=True):
        if share > _SHARE_SHOWN:
            end = start - 360 * share
            wedge = Wedge(place, radius, end, start, facecolor=color, edgecolor="none", zorder=3)
            axes.add_patch(wedge)
            start = end
    rim = Circle(place, radius, facecolor="none", edgecolor=INK, linewidth=0.6, zorder=4)
    axes.add_patch(rim)


def _draw_label(
    axes: Any, node: Node, place: tuple[float, float], radius: float, *, size: float
) -> None:
    """Write a checkpoint's name to its left, an expert's number to its right."""
    (x, y), gap = place, radius + 0.07
    at, align = ((x - gap, y), "right") if node.column == 0 else ((x + gap, y), "left")
    _write(axes, at, node.label, size=size, align=align, order=5)
