"""Files of JSON -> their records, each with the text that it was read from."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from upit_merge.data.json_text import NotingDecoder, check_columns
from upit_merge.data.lines import lines_of
from upit_merge.errors import UpitError

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class JsonRecord:
    """One record.

    Attributes:
        source: Where it is from: "seed.jsonl line 17".
        text: As it stands there; on one line.
        value: What the text says, as far as Python's values can.
        constant: NaN, Infinity or -Infinity, if the text has one, which is no JSON.
    """

    source: str
    text: str
    value: Any
    constant: str | None


def json_records(path: Path, columns: Collection[str] = ()) -> Iterator[JsonRecord]:
    """Yield the objects of a file, which has one on each line or one list of them.

    Args:
        columns: Those that are read: their values must be all that their texts are.

    Raises:
        UpitError: the file is no JSON, or as `check_columns`.
    """
    decoder = NotingDecoder()
    for source, text, value in _read(path, decoder):
        if decoder.lossy and columns:
            check_columns(text, columns, source)
        yield JsonRecord(source, text, value, decoder.constant)
        decoder.forget()


def _read(path: Path, decoder: NotingDecoder) -> Iterator[tuple[str, str, Any]]:
    """Yield source, text and value of every record."""
    lines = lines_of(path)
    blank: list[str] = []
    for number, line in lines:
        if not line.strip():
            blank.append(line)
            continue
        if line.lstrip().startswith("["):  # one list of objects, over any number of lines
            rest = (line for _, line in lines)
            whole = "\n".join(chain(blank, [line], rest))
            yield from _read_list(path, whole, decoder)
            return
        yield _read_line(path, number, line, decoder)
        break
    for number, line in lines:
        if line.strip():
            yield _read_line(path, number, line, decoder)


def _read_line(path: Path, number: int, line: str, decoder: NotingDecoder) -> tuple[str, str, Any]:
    try:
        if line.startswith("\ufeff"):  # of a file that was put behind another
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", line, 0)
        return f"{path} line {number}", line, decoder.decode(line)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, number, error) from error


def _read_list(path: Path, text: str, decoder: NotingDecoder) -> Iterator[tuple[str, str, Any]]:
    try:
        for index, (start, end, value) in enumerate(_elements(text, decoder), 1):
            yield f"{path} record {index}", _on_one_line(text[start:end]), value
    except (ValueError, RecursionError) as error:
        raise _no_json(path, 1, error) from error


def _elements(text: str, decoder: NotingDecoder) -> Iterator[tuple[int, int, Any]]:
    """Yield where each element of a list in JSON begins and ends, and its value.

    Raises:
        ValueError, RecursionError: as `json.loads`.
    """
    at = _after_space(text, text.index("[") + 1)
    ending = text[at : at + 1]
    while ending != "]":
        value, end = decoder.raw_decode(text, at)
        yield at, end, value
        at = _after_space(text, end)
        ending = text[at : at + 1]
        if ending == ",":
            at = _after_space(text, at + 1)
        elif ending != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if (end := _after_space(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _on_one_line(text: str) -> str:
    """Return a JSON text with its line ends, and what indents its lines, left out."""
    parts = (part.strip(" \t") for part in re.split(r"[\n\r]", text))  # strings have no line ends
    first, *others = [part for part in parts if part]
    line = [first]
    for part in others:
        is_edge = line[-1][-1] in "[{" or part[0] in "]}"
        line += [part] if is_edge else [" ", part]
    return "".join(line)


def _no_json(path: Path, first_line: int, error: Exception) -> UpitError:
    """Return what is told of a text that begins on a line, and is no JSON."""
    line, found = first_line, str(error)  # such as brackets too deep
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return UpitError(f"{path} line {line} is not JSON ({found}); put one JSON object on each line.")
