"""Pages of `upit-merge inspect` without a model, and a headless browser to look at them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from upit_merge.data.pieces import Piece
from upit_merge.report.routing_page import ShownSample, Views, routing_page

# A browser that talks to nobody: of its own accord it would.
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def headless_browser() -> Iterator[Any]:
    """A browser of playwright's.

    Skips the test where there is none, unless `UPIT_MERGE_BROWSER` is `required`.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        _missing("there is no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*_ARGUMENTS])
        yield browser
        browser.close()


def accessibility_checker() -> Any:
    """axe-core, to be run on a page; skips the test where it is not installed, as above."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        _missing("axe-playwright-python is not installed")
    return Axe()


def _missing(reason: str) -> NoReturn:
    if os.environ.get("UPIT_MERGE_BROWSER") == "required":
        pytest.fail(f"UPIT_MERGE_BROWSER is `required`, but {reason}")
    pytest.skip(reason)


def made_document(experts: int, layers: int, groups: Sequence[str], tokens: int) -> dict[str, Any]:
    """What `inspect --json` would say of a mixture whose second expert is dead in the first layer."""
    shares = torch.rand(layers, experts, generator=torch.Generator().manual_seed(0)) + 0.5
    shares[0, 1] = 0
    shares /= shares.sum(1, keepdim=True)
    rows = [
        {"expert": e, "share": float(shares[:, e].mean()), "state": "used"}
        | {"never_in": [], "dead_in": [0] if e == 1 else [], "rare_in": []}
        for e in range(experts)
    ]
    pair = {"distance": 0.1, "cosine": 0.2, "correlation": 0.96, "layers_alike": 1}
    return {
        "model": "moe",
        "format": "Mixtral",
        "data": "held-out.jsonl",
        "samples": 9,
        "tokens": 10 * tokens,
        "shown": {"samples": 2, "tokens": tokens},
        "num_experts": experts,
        "chosen": 2,
        "layers": [*range(layers)],
        "few_tokens": False,
        "thresholds": {"dead": 0.1, "rare": 0.5, "near": 0.25, "same": 0.002, "routing": 0.95},
        "groups": {
            name: {"samples": 3, "tokens": 5 * tokens, "shares": shares.tolist()}
            for name in (*groups, "all")
        },
        "whole": "all",
        "entropy": {"token": 0.5, "load": 0.9},
        "experts": rows,
        "usage": {"never": [], "dead": [{"layer": 0, "expert": 1}], "rare": []},
        "pairs": [
            {"experts": [0, 1], "of_median": 0.5, "by_weights": False, "by_routing": True, **pair}
        ],
        "advice": [{"text": "Fit the gates anew.", "command": "upit-merge router moe"}],
    }


def made_page(
    experts: int = 8,
    layers: int = 4,
    words: Sequence[str] = ("Where", " the", " router", " sends", " it", ".\n"),
    tokens: int = 60,
    top_k: int = 2,
    groups: Sequence[str] = ("code", "prose"),
) -> tuple[str, Views]:
    """A page of two samples of the same words, and who took which token."""
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(1 + layers, tokens, experts, generator=random) * 3
    probabilities = scores.square().softmax(2)
    weights, chosen = probabilities.topk(min(top_k, experts), dim=2)
    views = Views(chosen, weights / weights.sum(2, keepdim=True), weights[:, :, 0])
    ids = [i % len(words) for i in range(tokens)]
    half = tokens // 2
    samples = [
        ShownSample(n + 1, group, half, ids[part], [Piece(words[i]) for i in ids[part]])
        for n, (group, part) in enumerate(
            zip(groups, (slice(half), slice(half, tokens)), strict=True)
        )
    ]
    document = made_document(experts, layers, groups, tokens)
    return routing_page(document, samples, views, dict(enumerate(words))), views


def written(folder: Path, page: str, name: str = "page.html") -> str:
    """Put a page into a file; returns its address."""
    path = folder / name
    path.write_text(page, encoding="utf-8")
    return path.as_uri()
