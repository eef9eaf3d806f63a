"""What `upit-merge split` writes is what it read: every row whole, and read alike by all."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.commands import done, refused
from tests.support.seeds import CHAT, make_tokenizer
from upit_merge.data.examples import SeedExample, iter_examples
from upit_merge.data.partition import DataSource, write_parts
from upit_merge.data.training_set import training_set
from upit_merge.errors import UpitError

# What Python's own values do not keep, and `datasets` does not all read.
ODD = [
    '{"text": "a", "n": 1e400, "m": 0.10000000000000000555, "k": 123456789012345678901234567890}',
    '{"text":"b" , "id": 1, "id": 2}',
    ' {"text": "\\u00fc\\/\\ud83d\\ude00", "half": "\\ud83d", "sep": "\u2028\u0085"}\t',
    '{"z": -0, "text": "d", "a": 1.0E+2, "deep": {"x": [], "x": {}}}',
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rest(count: int = 26) -> list[str]:
    return [json.dumps({"text": f"text {index}", "id": index}) for index in range(count)]


def all_of(text: str) -> Any:
    """All that a JSON text says: every key, numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: ("an object", pairs),
        parse_float=lambda number: ("a number", number),
        parse_int=lambda number: ("a number", number),
        parse_constant=lambda number: ("a number", number),
    )


def written(folder: str = "split") -> list[str]:
    """The lines of all parts."""
    return [
        line
        for path in sorted(Path(folder).glob("*.jsonl"))
        for line in path.read_bytes().decode().split("\n")[:-1]
    ]


def read(*paths: Any) -> list[SeedExample]:
    """What the router and the trainer are given, wherever it is from."""
    examples = (example for path in paths for example in iter_examples(str(path)))
    return [dataclasses.replace(example, source="") for example in examples]


def in_parts(source: str, folder: str = "split") -> bool:
    """Whether the parts hold what the whole does."""
    found = Counter(map(repr, read(*sorted(Path(folder).iterdir()))))
    return found == Counter(map(repr, read(source)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_lines_are_written_as_they_stand(end: str, mark: bytes, last: str) -> None:
    lines = ODD + rest()
    Path("d.jsonl").write_bytes(mark + (end.join(lines) + last).encode())
    done("split", "d.jsonl", "--held-out", 5, "--seed-samples", 7)
    counts = {p.name: len(p.read_bytes().split(b"\n")) - 1 for p in Path("split").iterdir()}
    assert counts == {"train.jsonl": 18, "seed.jsonl": 7, "held-out.jsonl": 5}
    assert Counter(written()) == Counter(lines)
    assert in_parts("d.jsonl")


@pytest.mark.parametrize("indent", ["", "\n", "\r\n\t", "\n\n  "])
def test_a_list_s_elements_become_lines_that_say_the_same(indent: str) -> None:
    broken_up = [
        line.replace(", ", f"{indent},{indent}").replace("[]", f"[{indent}]")
        for line in ODD + rest()
    ]
    whole = f"{indent}[{indent}{f'{indent},'.join(broken_up)}{indent}]{indent}"
    Path("d.json").write_bytes(whole.encode())
    done("split", "d.json")
    found = written()
    assert len(found) == 30
    assert Counter(repr(all_of(line)) for line in found) == Counter(map(repr, all_of(whole)))
    assert in_parts("d.json")


def test_indented_json_becomes_the_lines_that_python_writes() -> None:
    rows = [{"text": f"a {n}", "meta": {"x": [1, []], "y": {}}, "n": None} for n in range(30)]
    Path("d.json").write_text(json.dumps(rows, indent=2))
    done("split", "d.json")
    assert Counter(written()) == Counter(map(json.dumps, rows))


def test_the_order_is_kept_in_every_part() -> None:
    lines = ODD + rest()
    Path("d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    parts = [("train", "seed", "held-out")[index % 3] for index in range(len(lines))]
    paths = {name: Path(f"{name}.jsonl") for name in ("train", "seed", "held-out")}
    write_parts(DataSource("d.jsonl"), parts, paths)
    for first, path in enumerate(paths.values()):
        assert path.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines[first::3])
        assert read(path) == read("d.jsonl")[first::3]


# ---- folders of all kinds -------------------------------------------------------------------


def calling(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]


@pytest.fixture
def mixed() -> Path:
    folder = Path("mixed")
    folder.mkdir()
    (folder / "1.jsonl").write_bytes("\r\n".join(ODD).encode())
    (folder / "2.json").write_text(f"[{', '.join(rest(10))}]")
    # In a table all calls have all arguments.
    rows = [{"messages": calling(**{"xy"[n % 2]: n}), "score": n / 3} for n in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "3.parquet", compression="zstd")
    (folder / "4.txt").write_text("one\n\ntwo\nlines\n\nthree")
    (folder / "5.csv").write_text("text\nleft out beside others\n")
    return folder


def test_a_folder_of_all_kinds(mixed: Path) -> None:
    done("split", mixed)
    lines = written()
    assert len(lines) == 4 + 10 + 10 + 3
    assert not Counter(ODD) - Counter(lines)
    scores = [row["score"] for row in map(json.loads, lines) if "score" in row]
    assert sorted(scores) == [n / 3 for n in range(10)]
    assert in_parts("mixed")


def test_the_trainer_is_given_the_same(mixed: Path, tmp_path: Path) -> None:
    import datasets

    for name in ("1.jsonl", "2.json", "4.txt"):
        (mixed / name).unlink()
    (mixed / "1.jsonl").write_text(json.dumps({"messages": calling(z=0.1), "more": 1e300}))
    done("split", mixed, "--held-out", 3, "--seed-samples", 3)
    tokenizer = make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        whole = [*training_set("mixed", tokenizer, other_template=True)]
        parts = [*training_set("split", tokenizer, other_template=True)]
    assert Counter(map(repr, parts)) == Counter(map(repr, whole))


def test_what_is_no_json_is_written_and_said(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (mixed / "1.jsonl").open("a") as file:
        file.write('\n{"text": "e", "x": [-Infinity]}\n{"text": "NaN", "x": NaN}\n')
    table = pa.table({"text": ["f", "NaN"], "x": [float("nan"), 1.0]})
    pq.write_table(table, mixed / "6.parquet")
    done("split", mixed)
    told = [r.getMessage() for r in caplog.records if "no JSON" in r.getMessage()]
    assert told == [
        "mixed/1.jsonl line 5 has -Infinity, which is no JSON: it is written as it is, and other "
        "programs may refuse the file."
    ]
    assert '{"text": "e", "x": [-Infinity]}' in written()
    caplog.clear()
    (mixed / "1.jsonl").unlink()
    done("split", mixed, "--force")
    told = [r.getMessage() for r in caplog.records if "no JSON" in r.getMessage()]
    assert [line.partition(" has ")[0] for line in told] == ["mixed/6.parquet row 1"]
    assert in_parts("mixed")


def test_a_compressed_file_is_not_split_in_silence(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (mixed / "7.jsonl.gz").write_bytes(b"\x1f\x8b")
    (mixed / "5.csv").unlink()
    done("split", mixed)
    assert [record.getMessage() for record in caplog.records] == [
        "1 compressed file passed over in mixed, such as 7.jsonl.gz; unpack what is to be read."
    ]
    sentence = refused("split", mixed / "7.jsonl.gz", "--out", "other")
    assert sentence.startswith("mixed/7.jsonl.gz is compressed;")


def test_a_column_that_is_read_twice_is_refused(mixed: Path) -> None:
    with (mixed / "1.jsonl").open("a") as file:
        file.write('\n{"text": "a", "text": "b"}')
    assert refused("split", mixed) == (
        "mixed/1.jsonl line 5 has `text` twice; leave one of them out."
    )
    assert not Path("split").exists()


def test_a_column_that_no_model_reads_may_spoil_a_table(mixed: Path) -> None:
    """Only writing reads it."""
    bad = pa.array([b"caf\xe9"] * 9, "binary").view("string")
    table = pa.table({"text": [f"a {n}" for n in range(9)], "name": bad})
    pq.write_table(table, mixed / "6.parquet")
    assert refused("split", mixed).startswith("mixed/6.parquet is not readable parquet (")
    assert not Path("split").exists()
    columns = [pa.array([f"a {n}" for n in range(9)]), *[pa.array([*range(9)])] * 2]
    pq.write_table(pa.table(columns, ["text", "id", "id"]), mixed / "6.parquet")
    assert refused("split", mixed) == (
        "mixed/6.parquet has two columns with the name `id`; give each its own."
    )


def test_messages_of_a_table_with_times(mixed: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}", "at": datetime(2024, 1, 1)}]}
        for n in range(30)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, "d.parquet")
    done("split", "d.parquet")
    assert sum(pq.read_table(path).num_rows for path in Path("split").iterdir()) == 30
    pq.write_table(table, mixed / "6.parquet")
    assert refused("split", mixed, "--out", "other").startswith(
        "mixed/6.parquet row 1 cannot be written as JSON ("
    )


@pytest.mark.parametrize("change", [-1, 1])
def test_data_that_changes_while_it_is_read(change: int) -> None:
    Path("d.jsonl").write_text("\n".join(rest(9)))
    parts = ["train"] * (9 + change)
    with pytest.raises(UpitError, match=r"^d.jsonl was written to while"):
        write_parts(DataSource("d.jsonl"), parts, {"train": Path("train.jsonl")})


def test_what_is_passed_over_is_named_once(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mixed / "more").mkdir()
    for name in ("6.tsv", "notes.md", ".hidden"):
        (mixed / name).write_text("text\nmore\n")
    done("split", mixed)
    assert [record.getMessage() for record in caplog.records] == [
        "Passed over in mixed: 5.csv, 6.tsv, more/, notes.md; what is to be split, too, must be "
        ".jsonl, .json, .parquet or .txt, and in no folder of its own."
    ]
    caplog.clear()
    for number in range(20):
        (mixed / f"{number:02}.csv").write_text("text\nmore\n")
    done("split", mixed, "--force")
    (record,) = caplog.records
    assert "08.csv, 09.csv and 14 more;" in record.getMessage()
    caplog.clear()
    done("split", mixed / "5.csv", "--out", "alone", "--seed-samples", 0, "--held-out", 0)
    assert not caplog.records


def test_a_table_s_columns_that_no_model_reads_keep_what_is_null(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"messages": CHAT, "meta": {"a": n, "b": None}, "none": None, "n": n} for n in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), mixed / "6.parquet")
    caplog.set_level(logging.INFO)
    done("split", mixed)
    found = [row for row in map(json.loads, written()) if "meta" in row]
    assert sorted(found, key=lambda row: row["n"]) == rows
    told = [r.getMessage() for r in caplog.records if "without a value" in r.getMessage()]
    assert told == [
        "mixed/3.parquet has keys without a value, which models are not given: left out."
    ]
    assert in_parts("mixed")


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_that_python_does_not_read(sign: str, caplog: pytest.LogCaptureFixture) -> None:
    """The last that it reads has 4,300 digits."""
    last, number = sign + "9" * 4300, sign + "9" * 4301
    json.loads(last)
    with pytest.raises(ValueError, match="4300"):
        json.loads(number)
    Path("d.jsonl").write_text("\n".join([f'{{"text": "x", "n": {last}}}', *rest()]))
    done("split", "d.jsonl")
    assert not caplog.records
    Path("d.jsonl").write_text("\n".join([*rest(), f'{{"text": "x", "n": {number}}}']))
    done("split", "d.jsonl", "--force")
    assert [record.getMessage() for record in caplog.records] == [
        "d.jsonl line 27 has a number of 4,301 digits: it is written as it is, and other programs "
        "may refuse the file."
    ]
    assert f'{{"text": "x", "n": {number}}}' in written()
