"""Files of JSON -> their records, each with the text that it was read from."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upit_merge.data.json_text import NotingDecoder, check_columns
from upit_merge.data.lines import lines_of, text_pieces
from upit_merge.errors import UpitError

_SPACE = re.compile(r"[ \t\n\r]*")
_PEEK = 1024  # characters
_LONGEST_WORD = 16  # at least the characters of -Infinity, or of an escaped pair of surrogates


@dataclass(frozen=True)
class JsonRecord:
    """One record.

    Attributes:
        source: Where it is from: "seed.jsonl line 17".
        text: As it stands there; on one line.
        value: What the text says, as far as Python's values can.
        oddity: See `NotingDecoder.oddity`.
    """

    source: str
    text: str
    value: Any
    oddity: str | None


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
        yield JsonRecord(source, text, value, decoder.oddity)
        decoder.forget()


def _read(path: Path, decoder: NotingDecoder) -> Iterator[tuple[str, str, Any]]:
    """Yield source, text and value of every record."""
    if _is_list(path):  # of objects, over any number of lines
        yield from _read_list(path, decoder)
        return
    for number, line in lines_of(path):
        if line.strip():
            yield _read_line(path, number, line, decoder)


def _is_list(path: Path) -> bool:
    # What is not UTF-8 is told by who reads it.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        while beginning := file.read(_PEEK):
            if begun := beginning.lstrip():
                return begun.startswith("[")
    return False


def _read_line(path: Path, number: int, line: str, decoder: NotingDecoder) -> tuple[str, str, Any]:
    try:
        if line.startswith("\ufeff"):  # of a file that was put behind another
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", line, 0)
        return f"{path} line {number}", line, decoder.decode(line)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, number, error) from error


def _read_list(path: Path, decoder: NotingDecoder) -> Iterator[tuple[str, str, Any]]:
    window = _Window(text_pieces(path))
    try:
        for index, (text, value) in enumerate(_elements(window, decoder), 1):
            yield f"{path} record {index}", _on_one_line(text), value
    except json.JSONDecodeError as error:
        raise _no_json(path, window.line, window.placed(error)) from error
    except (ValueError, RecursionError) as error:
        raise _no_json(path, 1, error) from error


class _Window:
    """The text of a file that is read piece by piece, and of which no more than that is held.

    Attributes:
        text: What is held.
        at: Where in it what is not yet read begins.
        line: Of the file, in which `text` begins.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.text, self.at = "", 0
        self.line, self._column = 1, 1

    def grow(self) -> bool:
        """Let go of what is read, and hold twice as much of the rest.

        Returns:
            False at the end of the file, where all stays as it is.
        """
        piece = next(self._pieces, None)
        if piece is None:
            return False
        read, rest = self.text[: self.at], self.text[self.at :]
        lines = read.count("\n")
        self.line += lines
        self._column = self.at - read.rfind("\n") if lines else self._column + self.at
        parts, added = [rest, piece], len(piece)
        while added < len(rest) and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            added += len(piece)
        self.text, self.at = "".join(parts), 0
        return True

    def skip_space(self) -> str:
        """Move to what is no space, and return that character; nothing at the end."""
        self.at = _after_space(self.text, self.at)
        while self.at == len(self.text) and self.grow():
            self.at = _after_space(self.text, self.at)
        return self.text[self.at : self.at + 1]

    def may_mend(self, error: json.JSONDecodeError) -> bool:
        """Return whether it may be for the text that is not held yet that a value is none."""
        is_late = _after_space(self.text, error.pos) + _LONGEST_WORD >= len(self.text)
        return is_late or error.msg.startswith("Unterminated string")

    def placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """Return an error of the text that is held with its column in the file."""
        if error.lineno == 1:
            error.colno += self._column - 1
        return error


def _elements(window: _Window, decoder: NotingDecoder) -> Iterator[tuple[str, Any]]:
    """Yield each element of a list in JSON, as its text and its value.

    Raises:
        ValueError, RecursionError: as `json.loads`; where a `JSONDecodeError` is, is told of the
            text that the window holds.
    """
    while (at := window.text.find("[")) < 0:
        window.at = len(window.text)
        if not window.grow():
            raise json.JSONDecodeError("Expecting value", "", 0)  # written to meanwhile
    window.at = at + 1
    ending = window.skip_space()
    while ending != "]":
        yield _element(window, decoder)
        ending = window.skip_space()
        if ending == ",":
            window.at += 1
            window.skip_space()
    window.at += 1
    if window.skip_space():
        raise json.JSONDecodeError("Extra data", window.text, window.at)


def _element(window: _Window, decoder: NotingDecoder) -> tuple[str, Any]:
    """Return the element that begins here, and move behind it."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            behind = _after_space(window.text, end)
            if window.text[behind : behind + 1] not in (",", "]"):  # or the number goes on
                raise json.JSONDecodeError("Expecting ',' delimiter", window.text, behind)
        except json.JSONDecodeError as error:
            if not (window.may_mend(error) and window.grow()):
                raise
            decoder.forget()
            continue
        text = window.text[window.at : end]
        window.at = behind
        return text, value


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
