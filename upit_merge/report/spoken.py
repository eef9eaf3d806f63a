"""An answer on the terminal: as it comes, and in the colours or numbers of the experts it took."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from upit_merge.engine.generation import Answer
from upit_merge.engine.routed import Choices
from upit_merge.errors import printable

# Told apart on dark and light backgrounds; more experts than these are underlined, too.
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_black", "bright_magenta")


class Screen:
    """Where a conversation is shown.

    Args:
        file: A terminal or not; colours are used where it has some and NO_COLOR is not set.
        width: In characters; by default the terminal's.
    """

    def __init__(self, file: TextIO, *, width: int | None = None) -> None:
        self.console = Console(
            file=file, markup=False, highlight=False, emoji=False, soft_wrap=True, width=width
        )
        self._owner: int | None = None
        self._is_open = False

    @property
    def has_colours(self) -> bool:
        return self.console.color_system is not None and not self.console.no_color

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.finish()
        self.console.print(printable(text), style=style)

    def piece(self, text: str, owner: int | None = None) -> None:
        """Print what an answer has more, in an expert's colour, or behind its number."""
        if not text:  # the first bytes of a character
            return
        if owner is not None and owner != self._owner and not self.has_colours:
            self.console.print(f"[{owner}]", end="")
        self._owner = owner
        self._is_open = True
        style = "" if owner is None or not self.has_colours else colour(owner)
        self.console.print(Text(printable(text), style), end="")
        self.console.file.flush()

    def finish(self) -> None:
        """End an answer's last line, if there is one."""
        if self._is_open:
            self.console.print()
        self._owner, self._is_open = None, False

    def experts(self, answer: Answer, num_experts: int, layer: int | None = None) -> None:
        """Print an answer by the experts that weigh most for its tokens.

        Args:
            layer: In this layer; without it, in all together.
        """
        assert answer.choices is not None
        owners = answer.choices.owners(num_experts, layer).tolist()
        for number, piece in enumerate(answer.pieces):
            self.piece(piece, owners[number] if number < len(owners) else None)
        self.finish()

    def shares(self, choices: Choices, num_experts: int, *, by_layer: bool = False) -> None:
        """Print a table: of all choices of the answer's tokens, the share of each expert.

        Args:
            by_layer: A row for each layer, too.
        """
        counts = choices.counts(num_experts)
        rows = {"all": counts.sum(0)}
        if by_layer:
            rows |= {str(layer): counts[i] for i, layer in enumerate(choices.layers)}
        table = Table(title="Share of the tokens' choices", title_justify="left")
        table.add_column("layer", justify="right")
        for expert in range(num_experts):
            style = colour(expert) if self.has_colours else ""
            table.add_column(Text(f"expert {expert}", style), justify="right")
        for name, row in rows.items():
            shares = row.double() / max(1, int(row.sum()))
            table.add_row(name, *(f"{share:.1%}" for share in shares.tolist()))
        self.finish()
        self.console.print(table, soft_wrap=False)


def colour(expert: int) -> str:
    """Return the style of an expert's text."""
    style = _COLOURS[expert % len(_COLOURS)]
    return style if expert < len(_COLOURS) else f"underline {style}"
