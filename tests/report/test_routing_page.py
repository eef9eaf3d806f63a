"""The page of `inspect` as a file: what is in it, how large it is, that no text can break it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.support.pages import made_document, made_page
from upit_merge.data.pieces import Piece
from upit_merge.report.routing_page import (
    MARK,
    ShownSample,
    Views,
    embedded,
    most_tokens,
    routing_page,
)

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "\u2028\u2029",
    "\x00\x1b[2J\x07",
    "\u202egnp.exe\u202c",
    "שלום",
    "{{data}}{{script}}",
    "'\"`\\",
    "\ud800",
    " \n\t",
    "",
]


class Reader(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_nothing_is_loaded_and_the_policy_allows_its_own_alone() -> None:
    page, _ = made_page()
    assert page.startswith(MARK)
    reader = read(page)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "style", "action", "data"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = (a["content"] for t, a in reader.tags if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    style = re.findall(r"<style>(.*?)</style>", page, re.S)
    for kind, (content,) in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_no_text_breaks_the_page() -> None:
    """Neither as a token, nor in the vocabulary, nor as the name of a group."""
    plain, _ = made_page(tokens=2 * len(HOSTILE))
    page, _ = made_page(
        words=HOSTILE, tokens=2 * len(HOSTILE), groups=("</script><b>", "\u202e\u2028<i>'\"")
    )
    page.encode("utf-8")
    harmless = {"i", "option"}
    shape = [tag for tag, _ in read(plain).tags if tag not in harmless]
    assert [tag for tag, _ in read(page).tags if tag not in harmless] == shape
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]", page
    )
    data = data_of(page)
    assert data["vocabulary"]["0"] == HOSTILE[0]
    assert data["samples"][0]["name"] == "Sample 1 (</script><b>)"
    assert data["ids"] == [*range(len(HOSTILE))] * 2


def test_embedded_json_comes_back() -> None:
    content = {"</script>": ["\u2028<&>\u2029", "\ud800", "é中"], "n": 1.5}
    text = embedded(content)
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode("utf-8")
    assert json.loads(text) == content


def test_the_numbers_are_packed_as_they_were() -> None:
    page, views = made_page(experts=300, layers=2, tokens=40)
    data = data_of(page)
    chosen = torch.frombuffer(bytearray(base64.b64decode(data["chosen"])), dtype=torch.int16)
    assert torch.equal(chosen.view(views.experts.shape).long(), views.experts)
    shares = torch.frombuffer(bytearray(base64.b64decode(data["shares"])), dtype=torch.uint8)
    torch.testing.assert_close(
        shares.view(views.shares.shape) / 255, views.shares, atol=0.5 / 255 + 1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("experts", "layers", "top_k", "most"),
    [(8, 16, 2, 0.6e6), (8, 30, 2, 0.9e6), (64, 48, 2, 1.4e6), (128, 48, 8, 1.9e6)],
)
def test_2000_tokens_are_small(experts: int, layers: int, top_k: int, most: float) -> None:
    words = ["the", " mixture", " of", " experts", "\n", " 中", " <tag>", " xylophone"]
    tokens = most_tokens(layers, experts, top_k, 2000)
    assert (tokens == 2000) == (top_k == 2)  # 8 of 128 in 48 layers would be too much
    page, _ = made_page(experts, layers, words, tokens, top_k)
    assert len(page.encode()) < most


def test_tables_have_headers() -> None:
    page, _ = made_page()
    reader = read(page)
    scopes = [attributes.get("scope") for tag, attributes in reader.tags if tag == "th"]
    assert set(scopes) == {"row", "col"}
    tables = sum(tag == "table" for tag, _ in reader.tags)
    assert tables == 4
    assert sum(tag == "caption" for tag, _ in reader.tags) == tables


def test_many_groups_and_many_cells_are_bounded() -> None:
    document = made_document(256, 80, [f"kind {n}" for n in range(100)], 10)
    views = Views(torch.zeros(81, 1, 2, dtype=torch.int64), torch.ones(81, 1, 2), torch.ones(81, 1))
    samples = [ShownSample(1, "kind 3", 10, [5], [Piece("x")])]
    page = routing_page(document, samples, views, {5: "x"})
    assert len(page.encode()) < 2_000_000
    assert "77 small kinds of text have no column" in page
    assert "Too many layers and experts" in page


def test_the_files_are_in_the_package() -> None:
    folder = Path(__file__).parents[2] / "upit_merge" / "report"
    for name in ("html", "css", "js"):
        lines = (folder / f"routing_page.{name}").read_text(encoding="utf-8").count("\n")
        assert 10 < lines <= 400
