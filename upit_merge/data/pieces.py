"""Tokens as the text they are: what each adds to what can be read, and how that is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character (yet)
# So many tokens wait for a character to be whole; text may also have the one above itself.
_MOST_PIECES = 24
# Formatting characters that belong to what people write: they join letters, or keep them apart.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text.

    Attributes:
        text: What it adds; of tokens that are one character together, the first has all of it.
        part, parts: Which of how many tokens that make one piece of text it is, from 1.
    """

    text: str
    part: int = 1
    parts: int = 1


def text_pieces(input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Split a text at its tokens; the pieces, one after the other, are the text.

    A token is decoded after the one before it, since spaces and bytes depend on that.
    """

    def decoded(start: int, stop: int) -> str:
        ids = list(input_ids[start:stop])
        return str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    pieces: list[Piece] = []
    context = done = 0
    for stop in range(1, len(input_ids) + 1):
        before, now = decoded(context, done), decoded(context, stop)
        waits = now.endswith(_INCOMPLETE) and stop - done < _MOST_PIECES
        if waits and stop < len(input_ids):
            continue
        parts = stop - done
        pieces.append(Piece(now[len(before) :], 1, parts))
        pieces += [Piece("", part, parts) for part in range(2, parts + 1)]
        context, done = done, stop
    return pieces


def visible(text: str) -> str:
    """Return text in which nothing can change how the text around it is shown.

    Control characters become their pictures, characters that turn the direction of writing or end
    a line in their own way their numbers; line feeds and tabs stay.
    """
    return "".join(map(_visible, text))


def runs_leftwards(text: str) -> bool:
    """Return whether most letters of a text are of a script that is written from the right."""
    kinds = [unicodedata.bidirectional(character) for character in text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")


def _visible(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    category, code = unicodedata.category(character), ord(character)
    if category == "Cc":
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else _number(code)
    if category in ("Cf", "Zl", "Zp"):
        return _number(code)
    return _INCOMPLETE if category == "Cs" else character


def _number(code: int) -> str:
    return f"\u27e8U+{code:04X}\u27e9"
