"""Tables for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from upit_merge.merge.lineage import Lineage
from upit_merge.report.chosen import chosen_sentences, idle_sentence
from upit_merge.report.markdown import are_least
from upit_merge.report.next_steps import known_data_words

# Characters of a name, and of the words above numbers, that are not broken to make room.
_WHOLE_NAME = 20
_WHOLE_HEADER = 12
_NUMBER = re.compile(r"^\d+ ")


def show(table: Table) -> None:
    """Print a table on standard output, on lines of the terminal, or of $COLUMNS.

    Where there is neither, as in a pipe, lines have 160 characters. Nothing is cut off: names are
    folded; a table with more columns of numbers than there is room for comes in several, under
    one another, which all begin with its first column.
    """
    # No markup: names of models and of kinds of text may hold brackets.
    console = Console(markup=False)
    if not (console.is_terminal or os.environ.get("COLUMNS", "").isdigit()):
        console = Console(markup=False, width=160)
    natural = [_natural_width(column.header, column.cells) for column in table.columns]
    if table.title and _outer_width(natural) < cell_len(str(table.title)):
        # Else it would be wrapped to the table's own width.
        console.print(Text(str(table.title), "table.title"))
        table.title = None
    for part in _fitted(table, console.width):
        console.print(part)


def _fitted(table: Table, width: int) -> Iterator[Table]:
    """Yield a table, or parts of it with some of its columns each, that fit into `width`."""
    natural = [_natural_width(column.header, column.cells) for column in table.columns]
    if _outer_width(natural) <= width:
        yield table
        return
    needed = [_needed_width(column) for column in table.columns]
    for number, part in enumerate(_parts(needed, width)):
        cells = [list(table.columns[i].cells) for i in part]
        if number:
            cells[0] = _abbreviated(cells[0])
        headers = [table.columns[i].header for i in part]
        natural = [_natural_width(h, c) for h, c in zip(headers, cells, strict=True)]
        room = width - _outer_width([0] * len(part))
        widths = _shared(room, [needed[i] for i in part], natural)
        piece = Table(title=None if number else table.title, title_justify=table.title_justify)
        for i, header, chosen in zip(part, headers, widths, strict=True):
            justify = table.columns[i].justify
            piece.add_column(header, justify=justify, width=chosen, overflow="fold")
        for row in zip(*cells, strict=True):
            piece.add_row(*row)
        yield piece


def _abbreviated(names: list[Any]) -> list[Any]:
    """Return long names without their middle, unless they would be the same; they stand above.

    A number before a name does not make it another: nobody sees by it which model is meant.
    """
    half = _WHOLE_NAME // 2
    texts = [str(name) for name in names]
    short = [t if len(t) <= _WHOLE_NAME else f"{t[: half - 5]}…{t[-half - 4 :]}" for t in texts]
    unlike = [{_NUMBER.sub("", text, count=1) for text in shown} for shown in (short, texts)]
    return names if len(unlike[0]) < len(unlike[1]) else short


def _natural_width(header: Any, cells: Iterable[Any]) -> int:
    """Return how wide a column is if nothing in it is wrapped."""
    return max(map(cell_len, _lines([header, *cells])), default=0)


def _needed_width(column: Column) -> int:
    """Return how wide a column is at least: its numbers are whole, and words that are not too long."""
    header_words = [word for line in _lines([column.header]) for word in line.split()]
    header = max(map(cell_len, header_words), default=1)
    lines = _lines(column.cells)
    if column.justify == "right":  # numbers
        return max([min(header, _WHOLE_HEADER), *map(cell_len, lines)])
    words = [word for line in lines for word in line.split()]
    return min(max([header, *map(cell_len, words)]), _WHOLE_NAME)


def _lines(cells: Iterable[Any]) -> list[str]:
    return [line for cell in cells for line in str(cell).splitlines()]


def _outer_width(widths: Iterable[int]) -> int:
    """Return how wide a table is whose columns have these widths: with padding and borders."""
    return sum(width + 3 for width in widths) + 1


def _parts(needed: Sequence[int], width: int) -> Iterator[list[int]]:
    """Yield the columns that go into each part; the first is in all of them."""
    part = [0]
    for column in range(1, len(needed)):
        if len(part) > 1 and _outer_width([needed[i] for i in [*part, column]]) > width:
            yield part
            part = [0]
        part.append(column)
    yield part


def _shared(room: int, needed: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return widths of columns: what they need, and of what is left what the others leave them."""
    if sum(needed) > room:  # a terminal too narrow for a single number beside its name
        return [max(1, min(needed[0], room - sum(needed[1:]))), *needed[1:]]
    limit = 0
    while limit < room:
        grown = [max(n, min(w, limit + 1)) for n, w in zip(needed, wanted, strict=True)]
        if sum(grown) > room:
            break
        limit += 1
    return [max(n, min(w, limit)) for n, w in zip(needed, wanted, strict=True)]


def best_in_bold(rows: Sequence[Sequence[float]], digits: str) -> list[list[Text]]:
    """Return the cells of a table of perplexities, the least of every column in bold.

    Args:
        rows: The values.
        digits: Their format, such as `.2f`.
    """
    return [
        [
            Text(format(v, digits), "bold" if is_best else "")
            for v, is_best in zip(row, best, strict=True)
        ]
        for row, best in zip(rows, are_least(rows), strict=True)
    ]


def lineage_table(lineage: Lineage, labels: Sequence[str]) -> Table:
    """Tabulate where every expert comes from and what is in it, by the mean of several units."""
    title = "Experts"
    if len(lineage.units) > 1:
        title += f" (children: means of {len(lineage.units)} parts grown by themselves)"
    table = Table(title=title, title_justify="left")
    for column in ("expert", "grown from", "alpha", "share of each checkpoint"):
        table.add_column(column, overflow="fold")
    for index, expert in enumerate(lineage.experts):
        if expert.checkpoint is not None:
            table.add_row(str(index), labels[expert.checkpoint], "", "")
            continue
        shares = " ".join(f"{share:.2f}" for share in expert.weights)
        alpha = "" if expert.alpha is None else f"{expert.alpha:.3f}"
        parts = [unit.experts[index] for unit in lineage.units]
        table.add_row(str(index), origin_of(parts), alpha, shares)
    return table


class Ancestry(Protocol):
    """Has what `merge.lineage.Expert`, and its record in a report, say of an expert's parents."""

    @property
    def parents(self) -> tuple[int, int] | None: ...

    @property
    def weights(self) -> Sequence[float]: ...


def origin_of(parts: Sequence[Ancestry]) -> str:
    """Say what an expert that is no checkpoint comes from.

    Args:
        parts: Its ancestry in every unit that is grown by itself.
    """
    if parts[0].parents is None:
        return f"{sum(map(bool, parts[0].weights))} checkpoints, averaged"
    pairs = {expert.parents for expert in parts}
    if len(pairs) == 1:
        return "experts {} and {}".format(*parts[0].parents)
    return f"{len(pairs)} pairs of experts"


def bucket_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tabulate every expert's seed samples and its loss on them and on all."""
    table = Table(title="Seed samples by expert (loss in nats per token)", title_justify="left")
    for column in ("expert", "samples", "loss on its own", "loss on all"):
        table.add_column(column, justify="right")
    for row in rows:
        losses = (row["loss_own"], row["loss_all"])
        cells = ("" if loss is None else f"{loss:.4f}" for loss in losses)
        table.add_row(str(row["expert"]), str(row["samples"]), *cells)
    return table


def show_buckets(router: dict[str, Any], folder: str = "") -> None:
    """Print what the router's part of the report says of the seed samples, if it does.

    Args:
        folder: The mixture, as it is to stand in commands.
    """
    if not (buckets := router.get("buckets")):
        return
    show(bucket_table(buckets["experts"]))
    if "worth" in buckets:
        if buckets["loss_given_up"] > 0:
            print(
                f"The samples lose {buckets['loss_given_up']:.4f} nats per token by not all going "
                "to the expert that predicts them best."
            )
        print(buckets["worth"]["verdict"])
    chosen, data = router.get("chosen") or {}, known_data_words(router.get("settings") or {})
    for sentence in (*chosen_sentences(chosen), idle_sentence(chosen, folder, data)):
        if sentence:
            print(sentence)
