"""The pictures of a model card: who is drawn where, and that they can be seen on any page."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from PIL import Image

from tests.support.cards import described, evaluation, model
from upit_merge.report import figures
from upit_merge.report.document import Report
from upit_merge.report.family_tree import _apart, checkpoint_colors, family_tree
from upit_merge.report.figures import drawable
from upit_merge.report.heatmap import draw_routing
from upit_merge.report.plots import draw_pictures

TREE, SIMILARITY = "upit_experts.png", "upit_similarity.png"
ROUTING, TRAINING = "upit_routing.png", "upit_post_training.png"
# Of the Hub's pages, light and dark.
PAGES = ("#ffffff", "#0d1117")


def report(*sizes: int, **changes: Any) -> Report:
    return described(model(*sizes, **changes))


def history(length: int) -> dict[str, Any]:
    points = [{"step": i, "loss": 2 + 1 / (i + 1), "routing_entropy": 0.9} for i in range(length)]
    return {"history": points}


def luminance(color: Any) -> float:
    """Relative luminance of WCAG 2."""
    parts = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(one: Any, other: Any) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_whatever_the_page() -> None:
    assert contrast("white", "black") == pytest.approx(21)
    best = contrast(*PAGES) ** 0.5  # of what is to be read on both
    assert min(contrast(figures.INK, page) for page in PAGES) >= 0.95 * best
    for page in PAGES:
        for color in (figures.ACCENT, figures.SECOND):
            assert contrast(color, page) >= 3  # of lines and areas, by WCAG 2
        for count in (1, 2, 8, 64):
            for color in checkpoint_colors(count):
                assert contrast(color, page) >= 1.5  # of areas, which are told by hue too


@pytest.mark.parametrize(("m", "n"), [(3, 4), (4, 8), (4, 16), (8, 64), (32, 64)])
def test_pictures_have_no_ground_and_are_small_and_not_empty(
    tmp_path: Path, m: int, n: int
) -> None:
    told = report(m, n, evaluation=evaluation(n), post_training=history(50))
    assert draw_pictures(tmp_path, told) == [TREE, SIMILARITY, ROUTING, TRAINING]
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 250_000
        image = Image.open(path)
        assert image.width <= 1300
        assert 150 <= image.height <= 1300
        pixels = image.convert("RGBA")
        assert pixels.getpixel((1, 1))[3] == 0
        colors = pixels.getcolors(1 << 20)
        assert len(colors) > 10
        clear = sum(count for count, color in colors if color[3] == 0)
        assert clear > 0.05 * image.width * image.height
        # Its ink, as it is in the file.
        ink = [255 * part for part in to_rgb(figures.INK)]
        solid = [color for _count, color in colors if color[3] > 240]
        assert min(math.dist(color[:3], ink) for color in solid) < 12


def test_a_jpeg_has_a_ground(tmp_path: Path) -> None:
    draw_routing(tmp_path / "routing.jpg", [("text", [0.5, 0.5])], [[0.5, 0.5]])
    assert min(Image.open(tmp_path / "routing.jpg").convert("L").crop((0, 0, 4, 4)).getdata()) > 250


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (lambda: report(1, 1), []),
        (lambda: report(3, 3), [SIMILARITY]),
        (lambda: report(1, 1, evaluation=evaluation(2)), [ROUTING]),
        (lambda: report(3, 3, parameters={"expansion": "copy"}), [SIMILARITY]),
        (lambda: report(2, 2, checkpoint_cosine=[[1.0, 1.0], [1.0, 1.0]]), []),
        (lambda: report(1, 1, post_training=history(1)), []),
        (lambda: report(1, 1, post_training=history(2)), [TRAINING]),
    ],
)
def test_nothing_is_drawn_where_there_is_nothing_to_see(tmp_path: Path, told, expected) -> None:
    assert draw_pictures(tmp_path, told()) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_the_same_report_makes_the_same_files(tmp_path: Path) -> None:
    told = report(4, 8, evaluation=evaluation(8))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with rc_context({"font.size": 30, "figure.facecolor": "black"} if name == "b" else {}):
            draw_pictures(tmp_path / name, told)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_odd_names_can_be_drawn(tmp_path: Path, recwarn) -> None:
    names = ["$x$ {", "数据", "", "a" * 80]
    told = model(4, 6, evaluation=evaluation(6))
    for source, name in zip(told["sources"]["checkpoints"], names, strict=True):
        source["name"] = name
    groups = told["evaluation"]["groups"]
    groups |= dict.fromkeys(names, groups["letters"])
    assert draw_pictures(tmp_path, described(told)) == [TREE, SIMILARITY, ROUTING]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert drawable(names, "kind")[:3] == ["$x$ {", "kind 1", "kind 2"]
    assert len(drawable(names, "kind")[3]) <= 24


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch, caplog) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_pictures(tmp_path, report(3, 4)) == []
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("is left out of the model card") == 2


# ---- the family tree ---------------------------------------------------------------------


def test_children_are_linked_to_their_parents() -> None:
    """Experts 3 and 4 of checkpoints; 5 is a child of 3: one generation later."""
    told = report(3, 5)
    lineage = told.lineage.model_copy(
        update={
            "experts": [
                *told.lineage.experts,
                told.lineage.experts[3].model_copy(update={"parents": (3, 2), "alpha": 0.125}),
            ]
        }
    )
    tree = family_tree(lineage, ["a", "b", "c"])
    assert [node.label for node in tree.nodes] == ["0  a", "1  b", "2  c", "3", "4", "5"]
    assert [node.column for node in tree.nodes] == [0, 0, 0, 1, 1, 2]
    assert [(link.ancestor, link.descendant, link.share) for link in tree.links] == [
        (0, 3, 0.25),
        (1, 3, 0.75),
        (1, 4, 0.25),
        (2, 4, 0.75),
        (3, 5, 0.125),
        (2, 5, 0.875),
    ]
    heights = [node.height for node in tree.nodes]
    assert heights[0] > heights[1] > heights[2]
    assert heights[3] > heights[4]


def test_averages_are_linked_to_their_checkpoints() -> None:
    """Of three checkpoints one is an expert, and two are averaged into another."""
    told = report(3, 3)
    alone, other = told.lineage.experts[:2]
    average = other.model_copy(update={"checkpoint": None, "weights": [0.0, 0.5, 0.5]})
    lineage = told.lineage.model_copy(update={"experts": [alone, average]})
    tree = family_tree(lineage, ["a", "b", "c"])
    assert [node.label for node in tree.nodes] == ["0  a", "b", "c", "1"]
    assert [(link.ancestor, link.share) for link in tree.links] == [(1, 0.5), (2, 0.5)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 20))
def test_nodes_of_a_column_do_not_overlap(wanted: list[float], spare: int) -> None:
    gap = 1 / (len(wanted) + spare)
    found = _apart(dict(enumerate(wanted)), gap)
    heights = sorted(found.values())
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(heights))
    assert gap / 2 - 1e-9 <= heights[0]
    assert heights[-1] <= 1 - gap / 2 + 1e-9
    # Whoever wanted to be higher is.
    order = sorted(found, key=lambda node: found[node])
    assert [wanted[node] for node in order] == sorted(wanted)
