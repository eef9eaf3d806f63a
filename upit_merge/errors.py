"""The one error users see, and how values are written in sentences."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Sequence

import click

# Control characters, what changes the direction of a text, halves of characters, ends of lines.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Of the characters that change a text's direction, those that do so for more than themselves.
_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


class UpitError(click.ClickException):
    """A mistake the user can mend, told in one sentence: what was found, where, and what to do.

    Being a `click.ClickException`, it is printed as `Error: …` with exit status 1 and without a
    traceback by both command lines, `mergekit-yaml` and `upit-merge`. Whatever it quotes, it
    cannot write to the terminal: control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        hidden = {c for c in message if unicodedata.category(c) in _UNSEEN}
        super().__init__(message.translate({ord(c): repr(c)[1:-1] for c in hidden}))


class ResumableError(UpitError):
    """A failure of the surroundings (disk, memory, another process), not of the recipe.

    What is done of the run is kept: the same command goes on from there.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, to be quoted inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")


def shown(value: object) -> str:
    """Return a value as it is quoted in a sentence: on one line, and not too long."""
    return _cut(repr(value), 100)


def one_line(text: object) -> str:
    """Return text from elsewhere, such as another library's error, as part of a sentence.

    Line ends and control characters are escaped: a file from the internet must not be able to
    write to the terminal.
    """
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:400]), 200)


def printable(text: str) -> str:
    """Return text of several lines, such as a model's answer, as it may be printed on a terminal.

    Control characters are escaped, and what changes the direction of the text after it; ends of
    lines and tabs stay, carriage returns, which would let it write over itself, go.
    """
    return "".join(c if c in "\n\t" or not _harms(c) else repr(c)[1:-1] for c in text if c != "\r")


def _harms(character: str) -> bool:
    return (
        unicodedata.category(character) in _UNSEEN - {"Cf"}
        or unicodedata.bidirectional(character) in _DIRECTIONS
    )


def counted(number: int, what: str) -> str:
    """Return a number with its noun: 1 sample, 2 samples."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers, runs of them short: 0\u20133, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}\u2013{b}" for a, b in found)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def argument(value: object) -> str:
    """Return a path or another word as it is typed in a command, in any shell if that is possible."""
    text = str(value)
    bare = r"[\w@%+=:,./\\~-]+" if os.name == "nt" else r"[\w@%+=:,./~-]+"
    if re.fullmatch(bare, text):
        return text
    # In double quotes bash and zsh would expand these; cmd takes no other quotes.
    return shlex.quote(text) if set(text) & set('$`!"\\') else f'"{text}"'
