"""JSON of data as it stands in its file: judged by Python's own parser, told to keep everything."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.seeds import CHAT
from tests.support.spoilt import refusal
from upit_merge.data import lines
from upit_merge.data.examples import read_seed_data
from upit_merge.data.json_records import json_records
from upit_merge.errors import UpitError


class Number(str):
    """A number's text."""

    __slots__ = ()


def all_of(text: str) -> Any:
    """All that a JSON text says: every key, numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: ("an object", pairs),
        parse_float=Number,
        parse_int=Number,
        parse_constant=Number,
    )


# ---- any JSON -------------------------------------------------------------------------------

SPACES = st.text(" \t\n\r", max_size=3)
STRINGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(json.dumps),
    st.text("a\u2028\u0085 \t{}[],", max_size=6).map(lambda t: json.dumps(t, ensure_ascii=False)),
    st.sampled_from(['"\\ud83d"', '"\\u0061\\/"', '"  "']),
)
NUMBERS = st.sampled_from(
    (
        "0 -0 1e400 -1E+999 0.10000000000000000001 12345678901234567890123 1.0e0 NaN -Infinity "
        f"1e-400 {'9' * 5000}"
    ).split()
)


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    """A JSON text with spaces and line ends wherever they may be."""
    kind = draw(st.integers(0, 4 if depth else 2))
    if kind < 3:
        return draw([STRINGS, NUMBERS, st.sampled_from(["null", "true"])][kind])
    inner = draw(st.lists(values(depth - 1), max_size=3))
    if kind == 3:
        return "[" + ",".join(draw(SPACES) + i + draw(SPACES) for i in inner) + draw(SPACES) + "]"
    return "{" + ",".join(member(draw, i) for i in inner) + draw(SPACES) + "}"


def member(draw: st.DrawFn, value: str) -> str:
    key = draw(st.sampled_from(['"a"', '"\\u0061"', '"b"']))
    return draw(SPACES) + key + draw(SPACES) + ":" + draw(SPACES) + value + draw(SPACES)


@contextlib.contextmanager
def pieces(size: int) -> Iterator[None]:
    """Lists are read so many bytes at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_PIECE", size)
        yield


@given(st.lists(values(), max_size=4), SPACES)
def test_the_text_of_each_record_says_what_the_list_does(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], space: str
) -> None:
    whole = f"{space}[{f'{space},'.join(texts)}{space}]{space}\n"
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_bytes(whole.encode())
    found = list(json_records(path))
    with pieces(1):
        assert list(map(repr, json_records(path))) == list(map(repr, found))
    assert [all_of(record.text) for record in found] == all_of(whole)
    assert not any("\n" in record.text or "\r" in record.text for record in found)
    for record, text in zip(found, texts, strict=True):
        said = {"NaN", "-Infinity", "9" * 5000} & json_numbers(all_of(text))
        assert (record.oddity is not None) == bool(said)


def json_numbers(value: Any) -> set[str]:
    if isinstance(value, Number):
        return {value}
    found: set[str] = set()
    for inner in value if isinstance(value, list | tuple) else ():
        found |= json_numbers(inner)
    return found


@given(st.lists(values().map(lambda t: t.replace("\n", " ").replace("\r", " ")), min_size=1))
def test_lines_are_what_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    texts = [text for text in texts if not text.lstrip().startswith("[")] or ["{}"]
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \n".join(texts).encode())
    assert [record.text for record in json_records(path)] == texts


@given(st.data())
def test_a_broken_list_is_told_as_the_parser_tells_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = '[{"text": "a"},\n {"text": [1, "b"]} ,{"text": "c"}] \n'
    at = data.draw(st.integers(1, len(text)))
    broken = text[:at] + data.draw(st.text('[]{},:"1\n ', max_size=2)) + text[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "broken.json"
    path.write_text(broken)
    wrong = mistake(broken.removesuffix("\n"))
    size = data.draw(st.integers(1, 50))
    if wrong is None:
        with pieces(size):
            list(json_records(path))
        return
    with pieces(size), pytest.raises(UpitError) as found:
        list(json_records(path))
    if "trailing comma" not in wrong.msg:  # which newer parsers look for
        told = f"{wrong.msg.removesuffix(' at')} at column {wrong.colno}"
        assert f"line {wrong.lineno} is not JSON ({told})" in str(found.value)


def mistake(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None


def test_of_a_long_list_little_is_held_at_a_time() -> None:
    """On one line, of characters that take four bytes each in a Python text."""
    record = json.dumps({"text": "\U0001f600" * 50 + "a" * 10_000}, ensure_ascii=False)
    Path("d.json").write_text(f"[{', '.join([record] * 2000)}]", encoding="utf-8")
    size = Path("d.json").stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_records(Path("d.json"))) == 2000
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_a_list_that_is_not_utf8(size: int) -> None:
    Path("d.json").write_bytes(b'\r\n [{"text": "\xc3\xbc"},\n{"text": "a\xfc"}]')
    with pieces(size):
        assert refusal(read_seed_data, "d.json") == (
            "d.json line 3 is not UTF-8 text (byte 0xfc at column 12); save the file as UTF-8."
        )


# ---- what values cannot hold ----------------------------------------------------------------

KEPT = "write it as a text, or leave it out."
CALLED = '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": %s}}]}'
LOST = {
    '{"text": "a", "text": "b"}': "has `text` twice; leave one of them out.",
    '{"text": "a", "\\u0074ext": "a"}': "has `text` twice; leave one of them out.",
    '{"text": "a", "kind": "x", "kind": "y"}': "has `kind` twice; leave one of them out.",
    '{"messages": [{"role": "user", "content": "a", "content": "b"}]}': (
        "has the key 'content' twice in an object of `messages`; leave one of them out."
    ),
    f'{{"messages": [{CALLED % "[1e400]"}]}}': (
        f"has a number in `messages` that cannot be kept (1e400); {KEPT}"
    ),
    f'{{"messages": [{CALLED % "NaN"}]}}': (
        f"has a number in `messages` that cannot be kept (NaN); {KEPT}"
    ),
    '{"messages": [%s]}' % (CALLED % '"{\\"x\\": 1, \\"x\\": 2}"'): (
        "has the key 'x' twice in an object of the arguments of a call in message 1 of `messages`; "
        "leave one of them out."
    ),
    '{"conversations": "[{\\"from\\": \\"gpt\\", \\"from\\": \\"human\\", \\"value\\": \\"a\\"}]"}': (
        "has the key 'from' twice in an object of `conversations`; leave one of them out."
    ),
    '{"conversations": [{"from": "function_call", "value": "{\\"name\\": \\"f\\", \\"n\\": 1e999}"}]}': (
        f"has a number in `value` of message 1 of `conversations` that cannot be kept (1e999); {KEPT}"
    ),
    '{"messages": [{"role": "user", "content": "a"}], "tools": "[{\\"a\\": 1, \\"a\\": 2}]"}': (
        "has the key 'a' twice in an object of `tools`; leave one of them out."
    ),
    '{"text": %s}' % ("9" * 5000): (
        f"has a number in `text` that cannot be kept ({'9' * 197}...); {KEPT}"
    ),
}


@pytest.mark.parametrize("line", LOST)
@pytest.mark.parametrize("is_list", [False, True])
def test_what_a_model_would_not_be_given_is_told(line: str, is_list: bool) -> None:
    Path("d.json").write_text(f"[{line}]" if is_list else line)
    column = "kind" if "kind" in line else None
    where = "record 1" if is_list else "line 1"
    assert refusal(read_seed_data, "d.json", column=column) == f"d.json {where} {LOST[line]}"


def test_the_datasets_librarys_reader_refuses_those_too() -> None:
    for line in ('{"text": "a", "text": "b"}', '{"x": {"a": 1, "a": 2}}', '{"x": 1e400}'):
        with pytest.raises(pyarrow.ArrowInvalid, match=r"twice|too big"):
            pyarrow.json.read_json(pyarrow.py_buffer(line.encode()))


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "id": 1, "id": 2}',
        '{"text": "a", "meta": {"x": 1, "x": [1e400, NaN]}}',
        '{"text": "a", "n": %s}' % ("9" * 5000),
        '{"text": "{\\"a\\": 1, \\"a\\": 2}"}',
        '{"prompt": "[1e400]", "completion": "{\\"a\\": 1, \\"a\\": 2}"}',
    ],
)
def test_what_no_model_is_given_is_no_mistake(line: str) -> None:
    Path("d.jsonl").write_text(line)
    (example,) = read_seed_data("d.jsonl")
    record = json.loads(line) if "99" not in line else {"text": "a"}
    assert (example.text, example.prompt) == (record.get("text"), record.get("prompt"))


def test_deep_values_with_a_key_twice_are_no_trouble() -> None:
    deep = "[" * 400 + '{"x": 1, "x": 2}' + "]" * 400
    Path("d.jsonl").write_text(f'{{"text": "a", "tools": {deep}}}')
    assert refusal(read_seed_data, "d.jsonl") == (
        "d.jsonl line 1 has the key 'x' twice in an object of `tools`; leave one of them out."
    )


def test_a_table_s_number_that_json_has_not() -> None:
    rows = [{"messages": CHAT, "tools": [{"least": float("nan")}], "score": float("inf")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    assert refusal(read_seed_data, "d.parquet") == (
        f"d.parquet row 1 has a number in `tools` that cannot be kept (nan); {KEPT}"
    )
    rows[0]["tools"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    assert len(read_seed_data("d.parquet")) == 1


def test_a_table_of_two_columns_with_one_name() -> None:
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(arrays, ["text", "text"]), "d.parquet")
    assert refusal(read_seed_data, "d.parquet") == (
        "d.parquet has two columns with the name `text`; give each its own."
    )


# ---- compressed files -----------------------------------------------------------------------


def test_a_compressed_file_is_told_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    import gzip

    packed = gzip.compress(b'{"text": "a"}\n')
    Path("d.jsonl.gz").write_bytes(packed)
    files = ".jsonl, .json, .parquet, .csv, .tsv or .txt"
    assert refusal(read_seed_data, "d.jsonl.gz") == (
        f"d.jsonl.gz is compressed; unpack it, and give the {files} file that was in it."
    )
    Path("folder").mkdir()
    for name in ("2.json.gz", "1.jsonl.zst", "notes.tar.gz"):
        Path("folder", name).write_bytes(packed)
    assert refusal(read_seed_data, "folder") == (
        f"The folder folder holds no {files} file (1.jsonl.zst is compressed); unpack it."
    )
    Path("folder/d.jsonl").write_text('{"text": "b"}\n')
    for _ in range(2):
        assert [example.text for example in read_seed_data("folder")] == ["b"]
    assert [record.getMessage() for record in caplog.records] == [
        "2 compressed files passed over in folder, such as 1.jsonl.zst; unpack what is to be read."
    ]
