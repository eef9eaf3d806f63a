"""Lines of a text file, told by their numbers; what is not UTF-8 is a mistake."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from upit_merge.errors import UpitError

_PIECE = 2**20  # bytes

NumberedLines = Iterator[tuple[int, str]]  # from 1


def lines_of(path: Path) -> NumberedLines:
    """Yield every line without its end.

    Raises:
        UpitError: the file is not UTF-8.
    """
    for number, line in whole_lines(path):
        yield number, line.rstrip("\r\n")


def whole_lines(path: Path) -> NumberedLines:
    """Yield every line with its end, as it stands there but for a byte order mark.

    Raises:
        UpitError: the file is not UTF-8.
    """
    # Bytes, for their lines end at \n only: JSON strings may hold U+2028 and its kind unescaped.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UpitError(
                    f"{path} line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at "
                    f"column {error.start + 1}); save the file as UTF-8."
                ) from error


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file piece by piece, but for a byte order mark and the last line's end.

    However long its lines are, little of it is held at a time.

    Raises:
        UpitError: as `whole_lines`.
    """
    held = ""  # line ends, which may be the last one
    for piece in _decoded(path):
        text = (held + piece).rstrip("\r\n")
        held = (held + piece)[len(text) :]
        if text:
            yield text
    if held := held.removesuffix("\n").rstrip("\r"):
        yield held


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        try:
            while data := file.read(_PIECE):
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            for _ in whole_lines(path):  # which tells where
                pass
            raise
