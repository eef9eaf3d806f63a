"""JSON of data -> values, and whether those say all that the text does.

Of a key that stands twice in an object, values keep the last; a number over 1.8e308 is infinite
in them. NaN and Infinity are no JSON, though Python reads them and chat templates would write them.
Where a model is to read any of this, it is a mistake; see `check_kept` and `check_columns`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from operator import itemgetter
from typing import Any

from upit_merge.errors import UpitError, one_line, shown


class NotingDecoder(json.JSONDecoder):
    """A decoder that notes what it cannot keep.

    Attributes:
        lossy: Whether a value said less than its text; set it to False to ask of the next.
        constant: NaN, Infinity or -Infinity, if the text had one; None likewise.
        digits: Of a whole number that is too long for Python to read; 0 likewise.
    """

    def __init__(self) -> None:
        super().__init__(
            object_pairs_hook=self._object,
            parse_float=self._number,
            parse_int=self._whole_number,
            parse_constant=self._constant,
        )
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.lossy = False
        self.constant: str | None = None
        self.digits = 0

    @property
    def oddity(self) -> str | None:
        """What the text has that other programs may not read, in words."""
        if self.constant is not None:
            return f"{self.constant}, which is no JSON"
        return f"a number of {self.digits:,} digits" if self.digits else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self.lossy |= len(found) < len(pairs)
        return found

    def _number(self, text: str) -> float:
        value = float(text)
        self.lossy |= math.isinf(value)
        return value

    def _whole_number(self, text: str) -> int | float:
        try:
            return int(text)
        except ValueError:  # Python reads no more than some thousand digits
            self.digits = len(text.lstrip("-"))
            return self._number(text)

    def _constant(self, text: str) -> float:
        self.lossy, self.constant = True, text
        return float(text)


def decode(text: str, what: str, source: str) -> Any:
    """Return the value of a JSON text that a model reads.

    Args:
        what, source: What the text is, and of which record, for error messages.

    Raises:
        ValueError, RecursionError: it is no JSON.
        UpitError: as `check_kept`.
    """
    decoder = NotingDecoder()
    value = decoder.decode(text)
    if decoder.lossy:
        check_kept(text, what, source)
    return value


def check_kept(text: str, what: str, source: str) -> None:
    """Refuse JSON that values cannot hold whole.

    Args:
        what, source: As `decode` takes them.

    Raises:
        UpitError: naming the key that stands twice, or the number.
    """
    _check(_pairs(text), what, source)


def check_columns(text: str, names: Collection[str], source: str) -> None:
    """Refuse a record in JSON of which a model reads what values cannot hold whole.

    Args:
        names: The columns that are read.
        source: Where the record is from, for error messages.

    Raises:
        UpitError: as `check_kept`, or naming the column that stands twice.
    """
    record = _pairs(text)
    if not isinstance(record, _Object):
        return
    seen = set()
    for name, value in record:
        if name not in names:
            continue
        if name in seen:
            raise UpitError(f"{source} has `{name}` twice; leave one of them out.")
        seen.add(name)
        _check(value, f"`{name}`", source)


def check_finite(value: Any, what: str, source: str) -> None:
    """Refuse a table's value that a model reads and JSON has not: NaN or an infinite number.

    Args:
        what, source: As `decode` takes them.

    Raises:
        UpitError: naming it.
    """
    rest = [value]
    while rest:
        inner = rest.pop()
        if isinstance(inner, float) and not math.isfinite(inner):
            raise _not_kept(inner, what, source)
        if isinstance(inner, dict):
            rest += inner.values()
        elif isinstance(inner, list):
            rest += inner


def _not_kept(number: object, what: str, source: str) -> UpitError:
    return UpitError(
        f"{source} has a number in {what} that cannot be kept ({one_line(number)}); write it as a "
        "text, or leave it out."
    )


class _Object(list[tuple[str, Any]]):
    """All keys of an object with their values, in order."""


class _Unkept(str):
    """The text of a number that no number of Python is."""

    __slots__ = ()


def _pairs(text: str) -> Any:
    """Return a JSON text's value with every key, and of its numbers those that cannot be kept."""
    return json.loads(
        text,
        object_pairs_hook=_Object,
        parse_float=_fraction,
        parse_int=_whole,
        parse_constant=_Unkept,
    )


def _fraction(text: str) -> _Unkept | None:
    return _Unkept(text) if math.isinf(float(text)) else None


def _whole(text: str) -> _Unkept | None:
    try:
        int(text)
    except ValueError:
        return _Unkept(text)
    return None


def _check(value: Any, what: str, source: str) -> None:
    rest = [value]  # no recursion: parsers may go deeper than functions
    while rest:
        inner = rest.pop()
        if isinstance(inner, _Unkept):
            raise _not_kept(inner, what, source)
        if isinstance(inner, _Object):
            counts = Counter(key for key, _ in inner)
            key, count = max(counts.items(), key=itemgetter(1), default=("", 0))
            if count > 1:
                raise UpitError(
                    f"{source} has the key {shown(key)} twice in an object of {what}; leave one of "
                    "them out."
                )
            rest += [value for _, value in reversed(inner)]
        elif isinstance(inner, list):
            rest += reversed(inner)
