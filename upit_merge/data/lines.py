"""Lines of a text file, told by their numbers; what is not UTF-8 is a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from upit_merge.errors import UpitError

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
