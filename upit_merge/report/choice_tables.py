"""Tables of what the tokens of an answer took, in a form that fits a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from upit_merge.engine.choices import Choices
from upit_merge.errors import runs

_TITLE = "Share of the tokens' choices"


def share_tables(
    choices: Choices,
    num_experts: int,
    console: Console,
    styles: Sequence[Style],
    *,
    layer: int | None = None,
    by_layer: bool = False,
) -> list[RenderableType]:
    """Tabulate, of all choices of some tokens, the share of each expert.

    Where a column for each expert is too wide, the experts come in several rows, the busiest first,
    in whole percents; those that nobody took are only named.

    Args:
        console: Where they will be printed.
        styles: Of the experts' numbers.
        layer: In this layer; without it, in all together.
        by_layer: A row for each layer, too.
    """
    counts = choices.counts(num_experts)
    rows = {"all": counts.sum(0)}
    if layer is not None:
        rows = {str(layer): counts[choices.layers.index(layer)]}
    elif by_layer:
        rows |= {str(layer): counts[i] for i, layer in enumerate(choices.layers)}
    shares = {name: (row.double() / max(1, int(row.sum()))) for name, row in rows.items()}
    everyone = range(num_experts)
    for title, name in ((_TITLE, "expert {}"), (f"{_TITLE}, by expert", "{}")):
        headers = [Text(name.format(expert), styles[expert]) for expert in everyone]
        table = _table(title, headers)
        for label, row in shares.items():
            table.add_row(label, *(f"{share:.1%}" for share in row.tolist()))
        if _width(table, console) <= console.width:
            return [table]
    return _in_blocks(shares, console, styles)


def _table(title: str, headers: Sequence[Text]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _width(table: Table, console: Console) -> int:
    """Return how wide a table is whose cells are not folded; its title may be."""
    options = console.options.update(max_width=10**6)
    return table.__rich_measure__(console, options).maximum


def _in_blocks(
    shares: Mapping[str, Tensor], console: Console, styles: Sequence[Style]
) -> list[RenderableType]:
    total = next(iter(shares.values()))
    order = total.argsort(descending=True, stable=True).tolist()
    taken = [expert for expert in order if total[expert] > 0]
    cells = {
        name: [_percent(share) for share in row[taken].tolist()] for name, row in shares.items()
    }
    widest = max(map(len, (*map(str, taken), *itertools.chain(*cells.values()))), default=1)
    label = max(map(len, ("layer", *shares)))
    # Two spaces between columns.
    room = max(1, (console.width - label) // (widest + 2))
    found: list[RenderableType] = []
    for start in range(0, len(taken), room):
        block = slice(start, start + room)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        table.add_column("layer", justify="right", min_width=label)
        for expert in taken[block]:
            header = Text(str(expert), styles[expert])
            table.add_column(header, justify="right", min_width=widest)
        for name, row in cells.items():
            table.add_row(name, *row[block])
        found += [table, ""]
    title = f"{_TITLE} in percent, the busiest experts first"
    unused = sorted(order[len(taken) :])
    never = [f"Never taken: {runs(unused)}."] if unused else []
    return [Text(title, "italic"), *found[:-1], *never]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share else "\u00b7"
