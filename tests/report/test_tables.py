"""Tables on a narrow terminal: every number in one piece, every name whole, nothing beyond the edge."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from tests.conftest import Family
from tests.support.commands import done
from tests.support.seeds import held_out
from upit_merge.commands.evaluate import _routing
from upit_merge.commands.plan import _cosine_table
from upit_merge.commands.shrink import _table as shrunk_table
from upit_merge.data.tokens import TokenizedSample
from upit_merge.report.tables import best_in_bold, show
from upit_merge.router.evaluation import Evaluation, Groups, Routing

LONG = "/home/somebody/models/a-name-without-an-end/of-a-run-2025/checkpoint"
Cells = list[list[str]]


def read(printed: str) -> list[Cells]:
    """Read tables back: rows of cells, whose lines are joined; the first row is the header's."""
    tables: list[Cells] = []
    for line in printed.splitlines():
        if line.startswith("┏"):
            tables.append([])
        if not line.startswith(("│", "┃")):
            continue
        parts = [part[1:-1] for part in re.split("[│┃]", line)[1:-1]]
        rows = tables[-1]
        is_header = line.startswith("┃")
        # A row begins where its last cell has something: a number, which is on one line.
        if not rows or (not is_header and parts[-1].strip()):
            rows.append([part.strip() for part in parts])
        else:
            rows[-1] = [old + new.strip() for old, new in zip(rows[-1], parts, strict=True)]
    return tables


def checked(
    table: Table,
    numbers: Sequence[Sequence[str]],
    capsys: pytest.CaptureFixture[str],
    width: int = 80,
) -> list[Cells]:
    """Print a table with names before numbers, and check that they are all there."""
    names = [str(cell) for cell in table.columns[0].cells]
    headers = [str(column.header) for column in table.columns]
    show(table)
    printed = capsys.readouterr().out
    assert all(cell_len(line) <= width for line in printed.splitlines())
    tables = read(printed)
    told = [row[0].replace(" ", "") for row in tables[0][1:]]  # they may be folded at a space
    assert told == [name.replace(" ", "") for name in names]
    found = [[cell for part in tables for cell in part[row][1:]] for row in range(len(names) + 1)]
    assert [cell.replace(" ", "") for cell in found[0]] == [h.replace(" ", "") for h in headers[1:]]
    assert found[1:] == [list(row) for row in numbers]
    for part in tables:  # rows of the later parts are told apart
        assert len({row[0] for row in part[1:]}) == len(names)
    return tables


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("count", [3, 8, 64])
@pytest.mark.parametrize("name", ["sft", LONG])
def test_similarities(count: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[(i - j) / count for j in range(count)] for i in range(count)]
    labels = [f"{name}-{index * 500}" for index in range(count)]
    numbers = [[f"{value:.4f}" for value in row] for row in rows]
    tables = checked(_cosine_table(labels, rows), numbers, capsys)
    assert (len(tables) > 1) == (count > 3)


@pytest.mark.parametrize("numbered", [True, False])
def test_names_that_differ_in_their_middle_are_told_apart_in_every_part(
    numbered: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    labels = [f"/home/somebody/run-{run}/checkpoint-of-the-end" for run in ("a", "b", "a-2")]
    if numbered:
        table = _cosine_table(labels, [[0.5] * 3] * 3)
    else:
        table = Table()
        table.add_column("model", overflow="fold")
        for kind in ("conversations", "novels", "everything"):
            table.add_column(kind, justify="right")
        for label in labels:
            table.add_row(label, *["0.5000"] * 3)
    tables = checked(table, [["0.5000"] * 3] * 3, capsys, 40)
    assert len(tables) > 1
    for part in tables:
        names = {re.sub("^[0-9] ?", "", row[0]) for row in part[1:]}
        assert len(names) == 3


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("kinds", [1, 2, 8, 30])
@pytest.mark.parametrize("experts", [8, 64])
def test_kinds_of_text(
    experts: int,
    kinds: int,
    width: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    samples = [
        TokenizedSample([1] * 9, 1, "", f"conversations-on-the-subject-of-{kind} in German")
        for kind in range(kinds)
    ]
    routing = Routing(kinds, 2, experts)
    routing.chosen += torch.rand(routing.chosen.shape, generator=torch.manual_seed(0)).double()
    routing.first += 1
    evaluation = Evaluation(samples, Groups.of(samples), torch.ones(kinds), routing)
    shares = [evaluation.shares(m).mean(0) for m in evaluation.groups.members.values()]
    numbers = [[f"{float(share[expert]):.1%}" for share in shares] for expert in range(experts)]
    checked(_routing(evaluation), numbers, capsys, width)


def test_names_of_other_models_and_characters_of_two_cells(capsys) -> None:
    table = Table(title="Perplexity beside other models", title_justify="left")
    table.add_column("model", overflow="fold")
    kinds = ["数学" * 12, "code", "all", "文", "[/x]"]
    for kind in kinds:
        table.add_column(kind, justify="right")
    values = [[12345.678 + row + column for column in range(5)] for row in range(2)]
    for name, cells in zip(
        (f"{LONG}-{'模' * 20}", "[bold]"), best_in_bold(values, ".2f"), strict=True
    ):
        table.add_row(name, *cells)
    checked(table, [[f"{value:.2f}" for value in row] for row in values], capsys)


@pytest.mark.parametrize("experts", [8, 64])
def test_merged_experts(experts: int, capsys: pytest.CaptureFixture[str]) -> None:
    groups = [SimpleNamespace(members=(i, i + experts // 2)) for i in range(experts // 2)]
    shares = torch.arange(2 * experts).view(2, experts) / (experts * 2)
    smaller = SimpleNamespace(
        scores=None, counts=SimpleNamespace(shares=shares), groups=[groups] * 2
    )
    show(shrunk_table(smaller))
    printed = capsys.readouterr().out
    assert all(cell_len(line) <= 80 for line in printed.splitlines())
    cells = " ".join(line.split("│")[2] for line in printed.splitlines() if "│" in line)
    wanted = [
        " + ".join(f"{m} ({shares[layer, m]:.0%})" for m in group.members)
        for layer in range(2)
        for group in groups
    ]
    told = " ".join(cells.split()).replace(
        f"{wanted[experts // 2 - 1]} ", f"{wanted[experts // 2 - 1]} | "
    )
    assert told == " | ".join(wanted)


def test_what_fits_is_printed_as_rich_does(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    table = Table(title="Numbers of experts", title_justify="left")
    for column in ("expert", "a sentence about it", "share"):
        table.add_column(column)
    table.add_row("0", "It was there before.", Text("12.0%", "bold"))
    Console(markup=False).print(table)
    expected = capsys.readouterr().out
    show(table)
    assert capsys.readouterr().out == expected


def test_a_title_is_not_wrapped_to_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    title = "Share of the routed places, mean over the layers"
    table = Table(title=title, title_justify="left")
    table.add_column("expert")
    table.add_row("0")
    show(table)
    assert capsys.readouterr().out.splitlines()[0] == title


def test_a_pipe_has_160_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    rows = [[0.5] * 30 for _ in range(30)]
    numbers = [["0.5000"] * 30] * 30
    labels = [f"{LONG}-{index}" for index in range(30)]
    checked(_cosine_table(labels, rows), numbers, capsys, 160)


def test_commands(family: Family, moe: Path, merge: Callable[..., Path], tmp_path: Path) -> None:
    """Names and numbers are whole in what is printed with long names of folders."""
    folder = tmp_path / "a-folder-of-models-with-a-name-that-goes-on" / "and-on-and-on-and-on"
    folder.mkdir(parents=True)
    names = []
    for index in range(7):
        names.append(str(folder / f"checkpoint-{index}00"))
        shutil.copytree(family.checkpoints[index % 3], names[-1])
    recipe = family.write_recipe(family.recipe(models=names))
    data = held_out(tmp_path)
    for words in (
        ["plan", recipe, "--data", data],
        ["run", recipe, tmp_path / "moe"],
        ["verify", tmp_path / "moe"],
        [
            "evaluate",
            moe,
            "--data",
            data,
            "--group-by",
            "kind",
            "--against",
            f"{folder.name * 3}={names[0]}",
        ],
        ["router", moe, "--data", data],
        ["shrink", moe, "--experts", "2", "--data", data],
    ):
        printed = done(*words).stdout
        edges = [line for line in printed.splitlines() if line.startswith(tuple("┏┡└│┃"))]
        assert edges or words[0] == "run", printed
        assert all(len(line) <= 80 for line in edges)
        assert not any("…" in line for line in edges if "checkpoint-" not in line), printed
        if words[0] == "plan":
            joined = "".join(line.split("│")[1].strip() for line in edges if "│" in line)
            assert all(name in joined for name in names)
        if words[0] == "evaluate":
            joined = "".join(line.split("│")[1].strip() for line in edges if "│" in line)
            assert folder.name * 3 in joined
