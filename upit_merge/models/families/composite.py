"""Language models that are published as a part of a model of text and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from upit_merge.models.families.base import DenseFamily, Piece


class LanguagePart(DenseFamily):
    """A language model that may have towers beside it: these are left out, and it is said.

    Attributes:
        beside: What the names of other parts' tensors begin with, `model.` aside, and what people
            call the part.
    """

    renames = True
    beside: ClassVar[Mapping[str, str]]

    def _part(self, name: str) -> str | None:
        """Return what part a tensor is of, if not of the language model."""
        within = name.removeprefix("model.")
        return next((told for start, told in self.beside.items() if within.startswith(start)), None)

    def told_of_left_out(self, names: Sequence[str]) -> str | None:
        parts = dict.fromkeys(part for name in names if (part := self._part(name)))
        if not parts:
            return None
        listed = " and ".join(sorted(parts))
        return f"the {listed} {'is' if len(parts) == 1 else 'are'} left out: the output reads text"

    def pieces(self, name: str, settings: Mapping[str, Any]) -> Sequence[Piece] | None:
        return () if self._part(name) else None
