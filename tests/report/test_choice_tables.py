"""Tables of what an answer's tokens took: all of it is there, whatever the width."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import torch
from rich.console import Console
from rich.style import Style

from upit_merge.engine.choices import Choices
from upit_merge.errors import runs
from upit_merge.report.choice_tables import share_tables


def made(num_experts: int, layers: int = 3, tokens: int = 20, top_k: int = 2) -> Choices:
    generator = torch.Generator().manual_seed(num_experts)
    favour = torch.rand(num_experts, generator=generator)
    scores = torch.rand(layers, tokens, num_experts, generator=generator) * favour
    weights, experts = scores.topk(top_k, 2)
    return Choices(tuple(range(layers)), experts, weights)


def printed(choices: Choices, num_experts: int, width: int, *, by_layer: bool = True) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    styles = [Style()] * num_experts
    for table in share_tables(choices, num_experts, console, styles, by_layer=by_layer):
        console.print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def read(lines: list[str]) -> dict[str, dict[int, float]]:
    """The shares in percent, by row and expert."""
    found: dict[str, dict[int, float]] = {}
    experts: list[int] = []
    for line in itertools.takewhile(lambda line: "Never" not in line, lines):
        name, *cells = re.findall(r"[\w.·%]+", line.replace("expert ", "")) or [""]
        if name == "layer":
            experts = [*map(int, cells)]
        elif experts and (name == "all" or name.isdecimal()):
            values = [0.0 if cell == "·" else float(cell.rstrip("%")) for cell in cells]
            found.setdefault(name, {}).update(zip(experts, values, strict=True))
    return found


@pytest.mark.parametrize(
    ("count", "width"),
    [
        (2, 80),
        (4, 80),
        (8, 80),
        (8, 60),
        (8, 200),
        (16, 80),
        (64, 80),
        (64, 200),
        (256, 80),
        (9, 12),
    ],
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_every_share_is_there(count: int, width: int, by_layer: bool) -> None:
    choices = made(count, layers=12)
    lines = printed(choices, count, width, by_layer=by_layer)
    assert max(map(len, lines)) <= width
    found = read(lines)
    assert [*found] == ["all", *(str(layer) for layer in range(12) if by_layer)]
    counts = torch.stack([torch.bincount(e.flatten(), minlength=count) for e in choices.experts])
    whole = torch.cat([counts.sum(0, keepdim=True), counts])
    shares = 100 * whole / whole.sum(1, keepdim=True)
    taken = (whole[0] > 0).nonzero().flatten().tolist()
    for row, of_row in zip(shares, found.values(), strict=False):
        assert {*taken} <= {*of_row}
        for expert in range(count):
            assert of_row.get(expert, 0) == pytest.approx(float(row[expert]), abs=0.501)
    # A number is never folded into a second line.
    alone = re.compile(r"[\s│]*[\d.]+%?[\s│]*")
    assert not any(map(alone.fullmatch, itertools.takewhile(lambda x: "Never" not in x, lines)))


def test_eight_experts_fit_on_eighty_columns() -> None:
    lines = printed(made(8), 8, 80)
    assert lines[0] == "Share of the tokens' choices, by expert"
    assert "expert 7" in printed(made(8), 8, 100)[2]


def test_one_expert_that_takes_everything_is_not_too_wide() -> None:
    """Four shares of 100.0%, of different experts."""
    experts = torch.arange(8).view(8, 1, 1)
    lines = printed(Choices(tuple(range(8)), experts, torch.ones(8, 1, 1)), 8, 80)
    assert read(lines)["3"] == {expert: 100.0 * (expert == 3) for expert in range(8)}


def test_many_experts_come_the_busiest_first() -> None:
    choices = made(64)
    lines = printed(choices, 64, 80)
    shares = [*read(lines)["all"].values()]
    assert shares == sorted(shares, reverse=True)
    (never,) = (n for n, line in enumerate(lines) if line.startswith("Never taken: "))
    told = re.findall("(\\d+)(?:\u2013(\\d+))?", "".join(lines[never:]).replace(",", ", "))
    unused = {n for a, b in told for n in range(int(a), int(b or a) + 1)}
    assert unused == {*range(64)} - {*choices.experts.flatten().tolist()}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], ""), ([4], "4"), ([0, 1, 2, 3, 7], "0\u20133, 7"), ([1, 3, 4], "1, 3\u20134")],
)
def test_runs_are_written_short(numbers: list[int], expected: str) -> None:
    assert runs(numbers) == expected
