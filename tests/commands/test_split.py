"""`upit-merge split`: three files without a common sample, read back by the `datasets` library."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from tests.support.commands import done, invoke, refused
from tests.support.spoilt import snapshot
from upit_merge.data import examples
from upit_merge.errors import UpitError

DOMAINS = ["code"] * 6 + ["math"] * 3 + ["chat"]


def rows_of(count: int = 100) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "prompt": f"question {index}",
            "completion": f"answer {index} ü\u2028",
            "domain": DOMAINS[index % 10],
            "meta": {"score": index / 7, "tags": ["x"] * (index % 3)},
        }
        for index in range(count)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_lines(tmp_path / "data.jsonl", rows_of())


def parts(kind: str = "json", folder: str = "split") -> dict[str, list[dict[str, Any]]]:
    """What the `datasets` library makes of the files."""
    return {
        path.stem: load_dataset(kind, data_files=str(path), split="train").to_list()
        for path in Path(folder).iterdir()
    }


def test_every_row_is_in_one_file_with_all_columns_in_its_order(data: Path) -> None:
    output = done("split", data, "--seed-samples", 20, "--held-out", "0.15").output
    found = parts()
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 65,
        "seed": 20,
        "held-out": 15,
    }
    for rows in found.values():
        ids = [row["id"] for row in rows]
        assert ids == sorted(ids)
        assert rows == [rows_of()[index] for index in ids]
    assert sorted(row["id"] for rows in found.values() for row in rows) == [*range(100)]
    assert [path.name for path in Path("split").iterdir() if path.name.startswith(".")] == []
    assert output.splitlines()[-2:] == [
        "  then, a recipe   upit-merge init . --data split/seed.jsonl",
        "  after the merge  upit-merge evaluate out/ --data split/held-out.jsonl",
    ]


def test_a_tenth_each_if_nothing_is_said(data: Path) -> None:
    done("split", data, "--quiet")
    assert {name: len(rows) for name, rows in parts().items()} == {
        "train": 80,
        "seed": 10,
        "held-out": 10,
    }


def test_the_seed_decides(data: Path) -> None:
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        done("split", data, "--out", out, "--seed", seed)
    one, again, two = (Path(out, "seed.jsonl").read_bytes() for out in ("one", "again", "two"))
    assert one == again != two


def test_the_choice_is_that_of_the_datasets_library(data: Path) -> None:
    done("split", data, "--held-out", 10, "--seed-samples", 0, "--seed", 7)
    expected = Dataset.from_list(rows_of()).train_test_split(test_size=10, seed=7)["test"]
    assert {row["id"] for row in parts()["held-out"]} == set(expected["id"])
    assert not Path("split/seed.jsonl").exists()


def test_groups_have_the_same_share_in_every_file(data: Path) -> None:
    done("split", data, "--group-by", "domain", "--seed-samples", 20, "--held-out", 10)
    for rows in parts().values():
        counts = Counter(row["domain"] for row in rows)
        tenth = len(rows) / 10
        assert counts == {"code": 6 * tenth, "math": 3 * tenth, "chat": tenth}


def test_rows_that_say_the_same_stay_together(data: Path) -> None:
    repeated = [
        {**row, "prompt": f"question {row['id'] % 50}", "completion": "so"} for row in rows_of()
    ]
    output = done("split", write_lines(data, repeated), "--held-out", 10).output
    assert "50 rows say the same as an earlier one" in output
    found = parts()
    prompts = {name: {row["prompt"] for row in rows} for name, rows in found.items()}
    assert len(prompts["held-out"]) == 10
    assert len(found["held-out"]) == 20
    assert not prompts["held-out"] & (prompts["train"] | prompts["seed"])
    assert not prompts["seed"] & prompts["train"]


def test_parquet_stays_as_it_is(data: Path) -> None:
    """With types that JSON has not, and metadata."""
    table = pa.Table.from_pylist(rows_of()).append_column(
        "at", pa.array([*range(100)], pa.timestamp("us"))
    )
    table = table.set_column(0, "id", table["id"].cast(pa.int16()))
    table = table.replace_schema_metadata({"made": "by a test"})
    pq.write_table(table, "data.parquet", row_group_size=17)
    table = pq.read_table("data.parquet")
    done("split", "data.parquet")
    found = {path.stem: pq.read_table(path) for path in Path("split").iterdir()}
    assert {name: len(part) for name, part in found.items()} == {
        "train": 80,
        "seed": 10,
        "held-out": 10,
    }
    for part in found.values():
        assert part.schema.equals(table.schema, check_metadata=True)
    together = pa.concat_tables(found.values()).sort_by("id")
    assert together.equals(table.combine_chunks())


@pytest.mark.parametrize(
    ("name", "text", "row"),
    [
        ("d.csv", "text,id\n" + "".join(f'"a, {i}",{i}\n' for i in range(30)), ("a, 3", "3")),
        ("d.tsv", "id\ttext\n" + "".join(f"{i}\ta {i}\n" for i in range(30)), ("a 3", "3")),
        ("d.txt", "\n\n".join(f"a {i}\nb" for i in range(30)), ("a 3\nb", None)),
        ("d.json", json.dumps([{"text": f"a {i}", "id": i} for i in range(30)]), ("a 3", 3)),
    ],
)
def test_other_files_become_jsonl(data: Path, name: str, text: str, row: tuple[str, Any]) -> None:
    Path(name).write_text(text)
    done("split", name)
    found = [row for rows in parts().values() for row in rows]
    assert len(found) == 30
    assert row in [(record["text"], record.get("id")) for record in found]


def test_a_folder_of_files_and_of_tables(data: Path) -> None:
    for kind in ("json", "parquet"):
        folder = Path(kind)
        folder.mkdir()
        for half in range(2):
            rows = rows_of()[50 * half : 50 * (half + 1)]
            if kind == "json":
                write_lines(folder / f"{half}.jsonl", rows)
            else:
                pq.write_table(pa.Table.from_pylist(rows), folder / f"{half}.parquet")
        done("split", folder, "--out", f"of-{kind}")
        found = parts(kind, f"of-{kind}")
        assert sorted(row["id"] for rows in found.values() for row in rows) == [*range(100)]


def test_a_dataset_of_the_hub_becomes_parquet(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset.from_list(rows_of())
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Dataset:
        asked.append((arguments, options["split"]))
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    done("split", "owner/name@v2", "--subset", "main", "--split", "test")
    assert {*asked} == {(("owner/name", "main"), "test")}
    monkeypatch.undo()
    found = {
        p.stem: Dataset.from_parquet(str(p), cache_dir=str(data.parent))
        for p in (data.parent / "split").iterdir()
    }
    assert {part.features == whole.features for part in found.values()} == {True}
    rows = sorted((row for part in found.values() for row in part), key=lambda row: row["id"])
    assert rows == whole.to_list()


SENTENCES = {
    "too few": (
        ["--held-out", 60, "--seed-samples", 40],
        "data.jsonl has 100 samples that differ, too few for 40 as seed data, 60 held out and some "
        "to train on; lower --seed-samples and --held-out, or give more data.",
    ),
    "no number": (
        ["--held-out", "some"],
        "--held-out is 'some'; give a number of samples, or a fraction such as 0.05.",
    ),
    "a negative number": (
        ["--seed-samples=-3"],
        "--seed-samples is '-3'; give a number of samples, or a fraction such as 0.05.",
    ),
    "no number either": (
        ["--seed-samples", "nan"],
        "--seed-samples is 'nan'; give a number of samples, or a fraction such as 0.05.",
    ),
    "no such column": (
        ["--group-by", "topic"],
        "data.jsonl line 1 has no column `topic` (it has `id`, `prompt`, `completion`, `domain`, "
        "`meta`); name one that is there.",
    ),
    "a column of nothing to group by": (
        ["--group-by", "meta"],
        "data.jsonl line 1 has an object in the column `meta`; make it a text or a whole number.",
    ),
    "groups of one": (
        ["--group-by", "id"],
        "data.jsonl has 1 sample of the group '0', and 3 are needed to have one in every file; "
        "leave out --group-by, or that group.",
    ),
    "more groups than samples": (
        ["--group-by", "domain", "--held-out", 2],
        "data.jsonl has 3 groups, of which 2 samples cannot hold one each; raise --held-out, or "
        "leave out --group-by.",
    ),
    "a file for the folder": (
        ["--out", "data.jsonl"],
        "data.jsonl is a file; give a folder as --out.",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_be_split_is_told_and_nothing_written(data: Path, case: str) -> None:
    words, sentence = SENTENCES[case]
    before = snapshot(data.parent)
    assert refused("split", "data.jsonl", *words) == sentence
    assert snapshot(data.parent) == before


def test_bad_data_is_told_and_nothing_written(data: Path) -> None:
    with data.open("a") as file:
        file.write('{"other": 1}\n')
    before = snapshot(data.parent)
    assert refused("split", "data.jsonl").startswith(
        "data.jsonl line 101 has `other` and no usable"
    )
    assert snapshot(data.parent) == before
    assert refused("split", "nowhere.jsonl").startswith("There is no data at 'nowhere.jsonl'")
    Path("empty").mkdir()
    assert refused("split", "empty").endswith("put the seed data there.")


def test_nothing_is_overwritten_unless_asked(data: Path) -> None:
    done("split", data)
    before = snapshot(data.parent)
    assert refused("split", data, "--seed", 1) == (
        "split/train.jsonl is there already; give another folder as --out, or pass --force to "
        "replace it."
    )
    assert snapshot(data.parent) == before
    done("split", data, "--seed", 1, "--force")
    assert snapshot(data.parent) != before


def test_the_data_itself_is_never_overwritten(data: Path) -> None:
    data.rename("train.jsonl")
    Path("folder").mkdir()
    write_lines(Path("folder/one.jsonl"), rows_of())
    before = snapshot(data.parent)
    assert refused("split", "train.jsonl", "--out", ".", "--force") == (
        "train.jsonl is the data itself; give another folder as --out."
    )
    assert refused("split", "folder", "--out", "folder", "--force") == (
        "folder is the folder that is split; give another one as --out."
    )
    assert snapshot(data.parent) == before


def test_tables_of_other_columns_are_not_put_together(data: Path) -> None:
    Path("tables").mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c"] * 9}), "tables/1.parquet")
    pq.write_table(pa.table({"text": ["d"], "more": [1]}), "tables/2.parquet")
    assert refused("split", "tables") == (
        "The files of tables are tables of other columns; split them one by one, each into a "
        "folder of its own (--out)."
    )
    assert not Path("split").exists()


def test_a_draft_that_is_a_link_is_not_followed(data: Path) -> None:
    """A folder from elsewhere may hold one."""
    victim = data.parent / "victim"
    victim.write_text("mine")
    Path("split").mkdir()
    os.symlink(victim, "split/.train.jsonl.draft")
    done("split", data)
    assert victim.read_text() == "mine"


def test_a_run_that_fails_while_writing_leaves_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upit_merge.commands import split

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(split, "sync_file", full)
    assert "disk of split is full" in refused("split", data)
    assert not Path("split").exists()


def test_files_are_read_as_the_router_reads_them(data: Path) -> None:
    done("split", data)
    found = [e for part in Path("split").iterdir() for e in examples.read_seed_data(str(part))]
    assert len(found) == 100
    with pytest.raises(UpitError):
        examples.read_seed_data("split/nothing.jsonl")


def test_help_names_the_files() -> None:
    assert "train, seed and held-out" in invoke("split", "--help").output
