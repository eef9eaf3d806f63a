"""`upit-merge split` into a folder of an earlier split, or of one that is at work."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.commands import done, refused
from tests.support.spoilt import snapshot
from upit_merge.commands import split
from upit_merge.commands.first_recipe.draft import quoted
from upit_merge.output.lock import exclusive

ROWS = [{"text": f"text {number}", "id": number} for number in range(40)]
THERE = "is there already; give another folder as --out, or pass --force to"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), "d.parquet")
    return tmp_path


def ids(folder: str = "split") -> dict[str, list[int]]:
    """The rows of every file of a folder."""
    return {
        path.name: pq.read_table(path)["id"].to_pylist()
        if path.suffix == ".parquet"
        else [json.loads(line)["id"] for line in path.read_text().splitlines()]
        for path in sorted(Path(folder).iterdir())
    }


@pytest.mark.parametrize(
    ("first", "then", "found", "left"),
    [
        (["d.jsonl"], ["d.jsonl", "--seed-samples", 0], "train.jsonl", ["held-out", "train"]),
        (["d.jsonl"], ["d.jsonl", "--held-out", 0], "train.jsonl", ["seed", "train"]),
        (["d.jsonl"], ["d.parquet"], "train.jsonl", ["held-out", "seed", "train"]),
        (["d.parquet"], ["d.jsonl"], "train.parquet", ["held-out", "seed", "train"]),
    ],
)
def test_no_file_of_an_earlier_split_stays(
    here: Path, first: list[Any], then: list[Any], found: str, left: list[str]
) -> None:
    done("split", *first)
    Path("split/notes.md").write_text("mine")
    before = snapshot(here)
    assert refused("split", *then, "--seed", 5).startswith(f"split/{found} {THERE}")
    assert snapshot(here) == before
    done("split", *then, "--seed", 5, "--force")
    assert Path("split/notes.md").read_text() == "mine"
    Path("split/notes.md").unlink()
    assert [*ids()] == [f"{name}{Path(then[0]).suffix}" for name in left]
    assert sorted(number for part in ids().values() for number in part) == [*range(40)]


def test_a_file_that_would_not_be_written_is_named() -> None:
    done("split", "d.jsonl")
    Path("split/train.jsonl").unlink()
    Path("split/held-out.jsonl").unlink()
    sentence = f"split/seed.jsonl {THERE} remove it."
    assert refused("split", "d.jsonl", "--seed-samples", 0) == sentence
    assert refused("split", "d.parquet") == sentence


def test_a_failed_split_leaves_the_earlier_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done("split", "d.jsonl")
    before = snapshot(here)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(split, "sync_file", full)
    assert "disk of split is full" in refused("split", "d.parquet", "--force")
    assert snapshot(here) == before


@pytest.mark.parametrize("options", [[], ["--seed-samples", 0]])
def test_data_in_the_folder_is_never_removed(here: Path, options: list[Any]) -> None:
    Path("split").mkdir()
    Path("d.jsonl").rename("split/seed.jsonl")
    os.symlink("split/seed.jsonl", "link.jsonl")
    before = snapshot(here)
    for data in ("split/seed.jsonl", "link.jsonl"):
        assert refused("split", data, *options, "--force") == (
            "split/seed.jsonl is the data itself; give another folder as --out."
        )
    assert snapshot(here) == before


def test_a_folder_of_that_name_is_not_removed(here: Path) -> None:
    Path("split/seed.parquet").mkdir(parents=True)
    assert refused("split", "d.jsonl", "--force") == (
        "split/seed.parquet is there already; give another folder as --out."
    )
    assert os.listdir("split") == ["seed.parquet"]


# ---- two at once ----------------------------------------------------------------------------


def test_one_split_at_a_time(here: Path) -> None:
    Path("split").mkdir()
    with exclusive(Path("split")):
        before = snapshot(here)
        assert refused("split", "d.jsonl", "--force") == (
            "Another run is writing to split; wait for it or choose another folder."
        )
        assert snapshot(here) == before
    done("split", "d.jsonl")
    assert len(ids()) == 3


def test_a_split_that_begins_while_another_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, and the first goes on."""
    write = split.write_parts
    sentences: list[str] = []

    def slow(*arguments: Any) -> None:
        write(*arguments)
        monkeypatch.setattr(split, "write_parts", write)
        sentences.append(refused("split", "d.jsonl", "--seed", 3, "--force"))

    done("split", "d.jsonl", "--out", "alone")
    monkeypatch.setattr(split, "write_parts", slow)
    done("split", "d.jsonl")
    assert sentences == ["Another run is writing to split; wait for it or choose another folder."]
    assert ids() == ids("alone")


def test_a_split_that_ended_meanwhile_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    read = split.read_samples

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(split, "read_samples", read)
        done("split", "d.jsonl", "--seed", 3)
        return read(*arguments)

    monkeypatch.setattr(split, "read_samples", late)
    assert refused("split", "d.jsonl") == f"split/train.jsonl {THERE} replace it."
    done("split", "d.jsonl", "--seed", 3, "--out", "alone")
    assert ids() == ids("alone")


def test_folders_that_were_made_are_removed_where_nothing_is_written() -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), "d.parquet")
    Path("tables").mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c"] * 9}), "tables/1.parquet")
    pq.write_table(pa.table({"text": ["d"], "more": [1]}), "tables/2.parquet")
    assert "tables of other columns" in refused("split", "tables", "--out", "new/of/it")
    assert not Path("new").exists()


# ---- what comes next ------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["plain", "sp #1", "a: b", "'x", "- y", "[z", "ü", "&a", "x\ty"])
def test_the_line_for_a_recipe_is_yaml(out: str) -> None:
    lines = done("split", "d.jsonl", "--out", f"./{out}").output.splitlines()
    (line,) = [line for line in lines if "fine-tune on it" in line]
    data = yaml.safe_load(line.partition("fine-tune on it")[2])
    assert data == {"data": f"{out}/train.jsonl"}
    assert Path(data["data"]).exists()
    words = shlex.split(lines[-1].partition("evaluate")[2])
    assert words[-1] == f"{out}/held-out.jsonl"


@pytest.mark.parametrize("text", ["a\nb", "a\x85", "\u2028ü", "\n", "", "a ... b", "ü", "no"])
def test_any_text_is_quoted_on_one_line(text: str) -> None:
    assert yaml.safe_load(f"data: {quoted(text)}") == {"data": text}
    assert len(quoted(text).splitlines()) == 1
