"""The page of `upit-merge inspect`: one file that loads nothing, with the text coloured by expert."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from upit_merge import __version__
from upit_merge.data.pieces import Piece, runs_leftwards, visible
from upit_merge.errors import counted
from upit_merge.report.palette import STEPS, Look, num_hues, stylesheet
from upit_merge.report.routing_sections import facts, heading, percent, safe, sections

# What a file begins with that may be replaced.
MARK = "<!doctype html>\n<!-- A page of upit-merge inspect"
# Groups of text that get a column; the rest is in --json.
MOST_GROUPS = 24
# Of a token's experts so many are in the page, those that weigh most.
MOST_KEPT = 8
# Of the choices, before they are written as text, which makes them a third longer.
_MOST_BYTES = 900_000


@dataclass(frozen=True)
class ShownSample:
    """The beginning of a sample.

    Attributes:
        number: Of the sample in the data, from 1.
        group: Its kind of text, if there are several.
        length: Tokens of the whole sample.
        ids, pieces: Of the tokens that are shown.
    """

    number: int
    group: str | None
    length: int
    ids: Sequence[int]
    pieces: Sequence[Piece]

    @property
    def name(self) -> str:
        group = "" if self.group is None else f" ({self.group})"
        return f"Sample {self.number}{group}"


@dataclass(frozen=True)
class Views:
    """Who took the shown tokens: over all layers, then in one layer after the other.

    Attributes:
        experts: The one that weighs most first, (1 + num_layers, num_tokens, kept).
        shares: Of the token's weight, of that shape.
        certainty: The first one's share of all scores, or of all weight, (1 + num_layers, tokens).
    """

    experts: Tensor
    shares: Tensor
    certainty: Tensor


def most_tokens(num_layers: int, num_experts: int, top_k: int, wanted: int) -> int:
    """Return how many tokens a page has room for, at most `wanted`."""
    per_choice = 2 if num_experts <= 256 else 3
    per_token = (num_layers + 1) * (min(top_k, MOST_KEPT) * per_choice + 1)
    return max(1, min(wanted, _MOST_BYTES // per_token))


def routing_page(
    document: Mapping[str, Any],
    samples: Sequence[ShownSample],
    views: Views,
    vocabulary: Mapping[int, str],
) -> str:
    """Return the page, HTML.

    Args:
        document: What `upit-merge inspect --json` writes.
        samples: What is shown, in the order of the tokens in `views`.
        vocabulary: Of every shown id, what the tokenizer calls it.
    """
    parts = {name: _part(f"routing_page.{name}") for name in ("html", "css", "js")}
    groups = _groups(document)
    style = f"{stylesheet(document['num_experts'])}\n{parts['css']}"
    values = {
        "style": style,
        "style_hash": _digest(style),
        "script": parts["js"],
        "script_hash": _digest(parts["js"]),
        "data": embedded(_data(document, samples, views, vocabulary, groups)),
        "title": safe(document["model"]),
        "lead": safe(heading(document)),
        "facts": facts(document),
        "kinds_title": "Experts by kind of text" if len(groups) > 1 else "Experts",
        "reading": _READING,
        "num_layers": str(len(document["layers"])),
        "group_hidden": "" if len(groups) > 1 else " hidden",
        "group_options": _options(groups),
        "legend": _legend(document),
        "many": " many" * (document["num_experts"] > 24),
        "samples": _text(samples, views, document["num_experts"]),
        "left_out": safe(_left_out(document, groups)),
        "sections": sections(document, groups),
        "version": safe(__version__),
    }
    # One pass, so that what is filled in is never taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], parts["html"])


_SCALE = "".join(f'<span class="u0 c{number}"></span>' for number in range(STEPS))
_READING = (
    "A token has the colour of the expert that weighs most for it, and the line below it. How "
    f'strong the colour is says how sure the router was: <span class="scale">{_SCALE}</span> from no '
    "more than an even share to everything (over all layers: of the gate weight). Experts of one hue differ in the line; numbers say the "
    "same as the colours."
)


def embedded(content: Any) -> str:
    """Return JSON that can stand in a script element: no text in it can end that, or a line."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Halves of characters, which UTF-8 cannot write.
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def _part(name: str) -> str:
    return files("upit_merge.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def _parted(shares: Tensor, most: int) -> Tensor:
    return (shares.double().clamp(0, 1) * most).round()


def _groups(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups that are shown: the largest ones, in their order, and all text last."""
    groups = dict(document["groups"])
    whole = groups.pop(document["whole"])
    largest = sorted(groups, key=lambda name: -groups[name]["tokens"])[: MOST_GROUPS - 1]
    shown = {name: group for name, group in groups.items() if name in largest}
    return {**shown, document["whole"]: whole}


def _data(
    document: Mapping[str, Any],
    samples: Sequence[ShownSample],
    views: Views,
    vocabulary: Mapping[int, str],
    groups: Mapping[str, Any],
) -> dict[str, Any]:
    experts = document["num_experts"]
    names = list(groups)
    start, described = 0, []
    for sample in samples:
        described.append(
            {
                "name": visible(sample.name),
                "group": names.index(sample.group) if sample.group in names else -1,
                "start": start,
                "count": len(sample.ids),
            }
        )
        start += len(sample.ids)
    shares = torch.tensor([group["shares"] for group in groups.values()], dtype=torch.float64)
    by_view = torch.cat([shares.mean(1, keepdim=True), shares], 1).transpose(0, 1)
    ids = [token for sample in samples for token in sample.ids]
    return {
        "layers": document["layers"],
        "experts": experts,
        "hues": num_hues(experts),
        "steps": STEPS,
        "kept": views.experts.shape[2],
        "samples": described,
        "ids": ids,
        "vocabulary": {str(i): visible(vocabulary[i]) for i in dict.fromkeys(ids)},
        "chosen": _packed(views.experts, "<u2" if experts > 256 else "u1"),
        "shares": _packed(_parted(views.shares, 255), "u1"),
        "certainty": _packed(_parted(views.certainty, 255), "u1"),
        "groups": _packed(_parted(by_view, 65535), "<u2"),
        "groupCount": len(names),
        "whole": names.index(document["whole"]),
    }


def step(certainty: float, num_experts: int) -> int:
    """Return how strong a token's tint is: from an even share (0) to all of it, by ratios."""
    way = math.log(max(1.0, certainty * num_experts)) / math.log(max(2, num_experts))
    return min(STEPS - 1, int(way * STEPS))


def _options(groups: Mapping[str, Any]) -> str:
    names = list(groups)[:-1]
    return "".join(
        f'<option value="{number}">{safe(name)}</option>' for number, name in enumerate(names)
    )


def _legend(document: Mapping[str, Any]) -> str:
    experts = document["num_experts"]
    items = []
    for row in document["experts"]:
        classes = Look.of(row["expert"], experts).classes
        items.append(
            f'<li><button type="button" class="chip {classes}" aria-pressed="false">'
            f'<b><span class="sr">expert </span>{row["expert"]}</b>'
            f"<span>{percent(row['share'])}</span></button></li>"
        )
    return "".join(items)


def _text(samples: Sequence[ShownSample], views: Views, num_experts: int) -> str:
    first, sure = views.experts[0, :, 0].tolist(), views.certainty[0].tolist()
    written, token = [], 0
    for sample in samples:
        spans = []
        for piece in sample.pieces:
            classes = Look.of(first[token], num_experts).classes
            classes += f" c{step(sure[token], num_experts)}"
            spans.append(_token(piece, classes))
            token += 1
        cut = len(sample.ids) < sample.length
        count = (
            counted(len(sample.ids), "token")
            if not cut
            else (f"the first {len(sample.ids):,} of {sample.length:,} tokens")
        )
        group = "" if sample.group is None else f"<span>{safe(sample.group)}</span>"
        label = safe(sample.name)
        direction = "rtl" if runs_leftwards("".join(p.text for p in sample.pieces)) else "ltr"
        written.append(
            f'<article class="sample"><h3>Sample {sample.number:,} {group} <span>{count}</span></h3>'
            f'<div class="tokens" dir="{direction}" role="listbox" aria-orientation="horizontal" '
            f'aria-label="{label}">{"".join(spans)}</div></article>'
        )
    return "".join(written)


def _token(piece: Piece, classes: str) -> str:
    text, more = visible(piece.text), ""
    if piece.parts > 1:
        more = f' data-part="{piece.part} of {piece.parts}"'
    label = None
    if piece.part > 1:
        text, label = "\u2027", f"piece {piece.part} of {piece.parts}"
    elif not text:
        text, label = "\u2205", "nothing"
    elif not text.strip():
        label = _white(text)
    if label is not None:
        more += f' aria-label="{label}"'
    shown = html.escape(text, quote=False).replace("\n", '<i class="nl"></i>\n')
    return f'<span class="t {classes}" role="option" tabindex="-1"{more}>{shown}</span>'


def _white(text: str) -> str:
    kinds = {"\n": "line break", "\t": "tab"}
    names: dict[str, int] = {}
    for character in text:
        name = kinds.get(character, "space")
        names[name] = names.get(name, 0) + 1
    return ", ".join(counted(number, name) for name, number in names.items())


def _left_out(document: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    shown = document["shown"]
    sentences = []
    if shown["tokens"] < document["tokens"]:
        sentences.append(
            f"Shown: {shown['tokens']:,} of {counted(document['tokens'], 'token')}, of "
            f"{shown['samples']:,} of {counted(document['samples'], 'sample')}; all numbers are of "
            "all of them."
        )
    if document["chosen"] > MOST_KEPT:
        sentences.append(f"Of a token's experts the {MOST_KEPT} that weigh most are listed.")
    if (hidden := len(document["groups"]) - len(groups)) > 0:
        sentences.append(
            f"{counted(hidden, 'small kind')} of text have no column; --json has them."
        )
    return " ".join(sentences) or "All tokens are shown."
