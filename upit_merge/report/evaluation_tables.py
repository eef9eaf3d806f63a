"""A mixture beside other models: the same table for the card and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from upit_merge.errors import counted
from upit_merge.report.evaluation_record import Evaluation, OtherModel, Paired, RivalResult
from upit_merge.report.markdown import are_least, best_in_bold, escaped, table
from upit_merge.report.verdict import gain_in_words


@dataclass(frozen=True)
class ComparedModel:
    """A row of the table.

    Attributes:
        name: What the model is called.
        values: Its perplexities, in the order of `Evaluation.columns`; None where it has none.
        mixture_is: How much lower the mixture's is, with the margin of error; or nothing.
        is_bound: It is no model, but a bound, and never the best.
    """

    name: str
    values: list[float | None]
    mixture_is: str = ""
    is_bound: bool = False


def compared_models(found: Evaluation) -> list[ComparedModel]:
    """Return the mixture and all that it was compared with."""
    groups = [found.groups[name] for name in found.columns]
    rows = [ComparedModel("this mixture", [group.perplexity for group in groups])]
    rivals = [] if found.worth is None else found.worth.rivals
    rows += [_rival(found, rival) for rival in rivals if rival.kind != "other"]
    if any(group.control_perplexity is not None for group in groups):
        shuffled = [group.control_perplexity for group in groups]
        rows.append(ComparedModel("gates fitted to shuffled buckets", shuffled))
    alone = groups[-1].experts_alone
    how = " (estimated)" if found.estimated else ""
    if alone is not None and not any(rival.kind == "single" for rival in rivals):
        best = alone.index(min(alone))
        cells = [g.experts_alone[best] if g.experts_alone else None for g in groups]
        rows.append(ComparedModel(f"expert {best} alone, the best of them{how}", cells))
    rows += [_other(found, other) for other in found.others]
    if any(group.best_expert_per_sample is not None for group in groups):
        bound = [group.best_expert_per_sample for group in groups]
        rows.append(ComparedModel(f"the best expert of each sample{how}", bound, is_bound=True))
    return rows


def _rival(found: Evaluation, rival: RivalResult) -> ComparedModel:
    values = [
        rival.perplexity
        if name == found.whole
        else rival.groups[name].perplexity
        if name in rival.groups
        else None
        for name in found.columns
    ]
    return ComparedModel(rival.name, values, _margin(found, rival))


def _other(found: Evaluation, other: OtherModel) -> ComparedModel:
    values = [
        other.groups.get(name, other.perplexity if name == found.whole else None)
        for name in found.columns
    ]
    return ComparedModel(other.model, values, _margin(found, other))


def _margin(found: Evaluation, paired: Paired) -> str:
    told = gain_in_words(paired)
    fewer = paired.samples < found.groups[found.whole].samples
    return f"{told} ({counted(paired.samples, 'sample')})" if told and fewer else told


def markdown_comparison(found: Evaluation) -> str:
    """Return the table for a card; of every column of perplexities the least is bold."""
    rows, margins = _rows(found)
    bounds = [number for number, row in enumerate(rows) if row.is_bound]
    cells = best_in_bold([row.values for row in rows], bounds)
    titles = ["model", *(f">{escaped(name)}" for name in found.columns), *margins]
    lines = [
        [escaped(row.name), *values, *[row.mixture_is] * bool(margins)]
        for row, values in zip(rows, cells, strict=True)
    ]
    return table(titles, lines)


def terminal_comparison(found: Evaluation) -> Table:
    """Return the same for the terminal; the columns say how much text they are of."""
    rows, margins = _rows(found)
    shown = Table(title="Held-out perplexity (lower is better)", title_justify="left")
    shown.add_column("model", overflow="fold")
    for name in found.columns:
        group = found.groups[name]
        counts = counted(group.samples, "sample"), counted(group.targets, "token")
        shown.add_column("\n".join([name, *counts]), justify="right")
    for title in margins:
        shown.add_column(title.removeprefix(">"), justify="right")
    bounds = [number for number, row in enumerate(rows) if row.is_bound]
    best = are_least([row.values for row in rows], bounds)
    for row, is_best in zip(rows, best, strict=True):
        cells = [*_cells(row.values, is_best), *[Text(row.mixture_is)] * bool(margins)]
        shown.add_row(Text(row.name), *cells)
    return shown


def _rows(found: Evaluation) -> tuple[list[ComparedModel], list[str]]:
    """Return the rows, and the title of the column of margins if there is one."""
    rows = compared_models(found)
    return rows, [">this mixture is"] if any(row.mixture_is for row in rows) else []


def _cells(values: Sequence[float | None], is_best: Sequence[bool]) -> Iterator[Text]:
    for value, best in zip(values, is_best, strict=True):
        yield Text("" if value is None else f"{value:.2f}", "bold" if best else "")
