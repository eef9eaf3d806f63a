"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from upit_merge.merge.lineage import Lineage
from upit_merge.report.markdown import are_least


def show(table: Table) -> None:
    """Print a table on standard output, as wide as it needs to be when that is not a terminal."""
    # No markup: names of models and of kinds of text may hold brackets.
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(markup=False, width=160)
    console.print(table)


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


def show_buckets(router: dict[str, Any]) -> None:
    """Print what the router's part of the report says of the seed samples, if it does."""
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
