"""The tables of the page of `upit-merge inspect`; complete without a script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from upit_merge.data.pieces import visible
from upit_merge.errors import counted, runs
from upit_merge.report.palette import HEAT_STEPS, Look

# A table of layers with more cells than this would be most of the page.
_MOST_CELLS = 8000
_MOST_PAIRS = 16


def safe(text: object) -> str:
    """Return text from elsewhere as HTML that shows it, whatever is in it."""
    return html.escape(visible(str(text)))


def heading(document: Mapping[str, Any]) -> str:
    """Return what was looked at, in two sentences."""
    return (
        f"{document['num_experts']} experts in each of {counted(len(document['layers']), 'layer')}, "
        f"{document['chosen']} for every token; a {document['format']}. The numbers are of "
        f"{counted(document['tokens'], 'token')} of {document['data']}."
    )


def facts(document: Mapping[str, Any]) -> str:
    """Return what is worth knowing first, as items of a description list."""
    usage, entropy = document["usage"], document["entropy"]
    pairs = [pair for pair in document["pairs"] if pair["by_weights"] or pair["by_routing"]]
    places = len(document["layers"]) * document["num_experts"]
    items = [
        (
            "experts",
            f"{document['num_experts']} <small>{document['chosen']} for every token</small>",
        ),
        ("layers", f"{len(document['layers'])} <small>with experts</small>"),
        (
            "tokens",
            f"{document['tokens']:,} <small>in {counted(document['samples'], 'sample')}</small>",
        ),
        ("dead places", f"{len(usage['dead'])} <small>of {places:,}</small>"),
        ("rare places", f"{len(usage['rare'])} <small>of {places:,}</small>"),
        ("twins", f"{len(pairs)} <small>of {counted(len(document['pairs']), 'pair')}</small>"),
        ("even load", f"{entropy['load']:.2f} <small>1 is even</small>"),
        ("doubt per token", f"{entropy['token']:.2f} <small>1 is a toss-up</small>"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items)


def sections(document: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """Return the tables below the text.

    Args:
        groups: Those of the document that get a column.
    """
    return "\n".join(
        (
            _section("kinds", _kinds_title(groups), _kinds(document, groups)),
            _section("layers", "Every layer", _layers(document)),
            _section("unused", "Dead and rarely used experts", _unused(document)),
            _section("twins", "Twins: experts that are nearly one", _twins(document)),
        )
    )


def _kinds_title(groups: Mapping[str, Any]) -> str:
    return "Experts by kind of text" if len(groups) > 1 else "What every expert gets"


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{content}</section>"
    )


def _table(
    caption: str,
    columns: Iterable[str],
    rows: Iterable[tuple[str, Iterable[str]]],
    *,
    name: str,
    classes: str = "",
) -> str:
    """Return a table whose first column heads its rows.

    Args:
        columns: HTML of the columns' headers, the first one's too.
        rows: HTML of a row's header, and its cells with their tags.
    """
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{header}</th>{"".join(cells)}</tr>' for header, cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {name}">'
        f'<table class="{classes}"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _chip(expert: int, num_experts: int) -> str:
    return f'<span class="chip {Look.of(expert, num_experts).classes}">{expert}</span>'


def _heat(share: float, most: float) -> str:
    return f"h{round((HEAT_STEPS - 1) * share / most) if most else 0}"


def percent(share: float) -> str:
    """Return a share as the page writes it, rounded like its script does."""
    return f"{100 * share:.1f}%" if 100 * share < 10 else f"{int(100 * share + 0.5)}%"


def _kinds(document: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    experts, whole = document["num_experts"], document["whole"]
    means = {name: _mean(group["shares"]) for name, group in groups.items()}
    most = max(map(max, means.values()))
    columns = ["expert"]
    for name, group in groups.items():
        title = "all text" if name == whole and len(groups) > 1 else safe(name)
        columns.append(f"{title}<small>{counted(group['tokens'], 'token')}</small>")
    rows = (
        (
            _chip(expert, experts),
            (
                f'<td class="{_heat(shares[expert], most)}">{percent(shares[expert])}</td>'
                for shares in means.values()
            ),
        )
        for expert in range(experts)
    )
    caption = (
        'Share of the routed places, <b id="kinds-view">mean over all layers</b>; '
        f"an even share is {percent(1 / experts)}"
    )
    note = (
        '<p class="note">Columns add up to 100%. Where all columns are alike, the router does not '
        "tell the kinds of text apart.</p>"
    )
    return note + _table(caption, columns, rows, name="shares by expert and kind of text")


def _mean(shares: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def _layers(document: Mapping[str, Any]) -> str:
    experts, layers = document["num_experts"], document["layers"]
    shares = document["groups"][document["whole"]]["shares"]
    if experts * len(layers) > _MOST_CELLS:
        return (
            '<p class="note">Too many layers and experts for a table; move through the layers '
            "above, or take the numbers of --json.</p>"
        )
    most, dead = max(map(max, shares)), document["thresholds"]["dead"] / experts
    rows = (
        (
            _chip(expert, experts),
            (
                f'<td class="{_heat(row[expert], most)}{" low" * (row[expert] < dead)}">'
                f"{100 * row[expert]:.0f}</td>"
                for row in shares
            ),
        )
        for expert in range(experts)
    )
    caption = (
        f"Percent of the routed places of a layer, all text; {100 / experts:.1f} is even. "
        "Underlined: dead"
    )
    columns = ["expert", *(f'<span class="sr">layer </span>{layer}' for layer in layers)]
    return _table(caption, columns, rows, name="shares by expert and layer", classes="dense")


def _unused(document: Mapping[str, Any]) -> str:
    usage, limits, experts = document["usage"], document["thresholds"], document["num_experts"]
    even = document["tokens"] * document["chosen"] / experts
    note = (
        f"An even share of a layer's {counted(document['tokens'], 'token')} is {even:,.0f} for each "
        f"expert. <b>Dead</b>: less than {limits['dead']:.0%} of that, under "
        f"{limits['dead'] * even:,.0f} tokens. <b>Rare</b>: less than {limits['rare']:.0%}, under "
        f"{limits['rare'] * even:,.0f}."
    )
    if document["few_tokens"]:
        note += " <b>That is too few to be sure: look at more text.</b>"
    rows = []
    for row in sorted(document["experts"], key=lambda row: row["share"]):
        if row["dead_in"] or row["rare_in"]:
            cells = (
                f"<td>{percent(row['share'])}</td>",
                f"<td>{row['state']}</td>",
                f"<td>{_places(row['dead_in'])}</td>",
                f"<td>{_places(row['rare_in'])}</td>",
            )
            rows.append((_chip(row["expert"], experts), cells))
    table = '<p class="verdict"><b>None.</b> Every expert is used in every layer.</p>'
    if rows:
        columns = ("expert", "share, mean", "over all layers", "dead in layers", "rare in layers")
        caption = f"{len(usage['never'])} of these places never got a single token"
        table = _table(caption, columns, rows, name="dead and rarely used experts", classes="words")
    return f'<p class="note">{note}</p>{table}{_advice(document)}'


def _places(layers: Sequence[int]) -> str:
    return runs(layers) or "\u2013"


def _advice(document: Mapping[str, Any]) -> str:
    items = []
    for advice in document["advice"]:
        command = advice.get("command")
        code = f"<pre><code>{safe(command)}</code></pre>" if command else ""
        items.append(f"<li>{safe(advice['text'])}{code}</li>")
    return f'<h3>What to do</h3><ul class="verdict">{"".join(items)}</ul>'


def _twins(document: Mapping[str, Any]) -> str:
    limits, experts = document["thresholds"], document["num_experts"]
    note = (
        "<b>By weights</b>: the distance of two experts' FFNs, over all layers, as a share of their "
        f"size, is under {limits['near']:.0%} of that of most pairs (the median), or under "
        f"{limits['same']:g}, which is rounding. <b>By routing</b>: the correlation of their router "
        f"logits over all tokens, mean over the layers, is at least {limits['routing']:g}. The "
        "cosine is of what tells each from the experts' mean: 1 for the same difference, negative "
        "for opposite ones."
    )
    pairs = document["pairs"]
    if not pairs:
        return f'<p class="note">{note}</p><p class="verdict">There is one expert only.</p>'
    twins = [pair for pair in pairs if pair["by_weights"] or pair["by_routing"]]
    shown = twins[:_MOST_PAIRS] if len(twins) > 3 else pairs[: max(3, len(twins))]
    rows = [(_both(pair["experts"], experts), _pair(pair, document)) for pair in shown]
    columns = (
        *("experts", "twins", "distance", "of the median", "cosine"),
        *("correlation of the logits", "layers alike"),
    )
    found = (
        f"{counted(len(twins), 'pair')} of {len(pairs):,} are twins"
        if twins
        else "No twins; the pairs that are nearest"
    )
    if len(shown) < len(twins):
        found += f", the first {len(shown)} here, all in --json"
    return f'<p class="note">{note}</p>' + _table(
        found, columns, rows, name="pairs of experts", classes="words"
    )


def _both(pair: Sequence[int], experts: int) -> str:
    return " ".join(_chip(expert, experts) for expert in pair)


def _pair(pair: Mapping[str, Any], document: Mapping[str, Any]) -> Iterable[str]:
    kinds = [word for word in ("weights", "routing") if pair[f"by_{word}"]]
    typical = "" if pair["of_median"] is None else f"{pair['of_median']:.2f}"
    cells = (
        f"by {' and '.join(kinds)}" if kinds else "no",
        "the same" if pair["distance"] == 0 else f"{pair['distance']:.2g}",
        typical,
        f"{pair['cosine']:.2f}",
        f"{pair['correlation']:.2f}",
        f"{pair['layers_alike']} of {len(document['layers'])}",
    )
    return (f"<td>{cell}</td>" for cell in cells)
