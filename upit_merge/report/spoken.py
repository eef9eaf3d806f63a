"""An answer on the terminal: as it comes, and in the colours or numbers of the experts it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from upit_merge.engine.choices import Choices
from upit_merge.engine.generation import Answer
from upit_merge.errors import printable

# Two answers stand side by side on a terminal so wide.
_WIDE = 100
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
        self._columns: _Columns | None = None

    @property
    def has_colours(self) -> bool:
        return self.console.color_system is not None and not self.console.no_color

    @property
    def is_split(self) -> bool:
        """Whether answers stand side by side now."""
        return self._columns is not None

    @contextlib.contextmanager
    def side_by_side(self, names: Sequence[str]) -> Iterator[None]:
        """Show the answers of these models in columns, where a terminal is wide enough."""
        if len(names) != 2 or not self.console.is_terminal or self.console.width < _WIDE:
            yield
            return
        columns = _Columns(self.console, names)
        with Live(
            console=self.console, get_renderable=columns.latest, refresh_per_second=8
        ) as live:
            self._columns = columns
            try:
                yield
            finally:
                self._columns = None
                columns.is_done = True
                live.refresh()

    def heading(self, name: str) -> None:
        """Begin the answer of a model among several."""
        if self._columns is not None:
            self._owner = None
            self._columns.next()
        else:
            self.line(f"{name}:", "bold")

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        if self._columns is not None:
            self._columns.add(f"\n{printable(text)}", style)
            return
        self.finish()
        self.console.print(printable(text), style=style)

    def piece(self, text: str, owner: int | None = None) -> None:
        """Print what an answer has more, in an expert's colour, or behind its number."""
        if not text:  # the first bytes of a character
            return
        is_new = owner is not None and owner != self._owner and not self.has_colours
        self._owner = owner
        style = "" if owner is None or not self.has_colours else colour(owner)
        text = (f"[{owner}]" if is_new else "") + printable(text)
        if self._columns is not None:
            self._columns.add(text, style)
            return
        self._is_open = True
        self.console.print(Text(text, style), end="")
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


class _Columns:
    """Two answers, each in half of the terminal: their ends while they come, and then the whole.

    Args:
        names: What the models are called.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console, self._names = console, names
        self._texts = [Text() for _ in names]
        self._current = -1
        self.is_done = False

    def next(self) -> None:
        self._current += 1

    def add(self, text: str, style: str) -> None:
        self._texts[self._current].append(text, style)

    def latest(self) -> Table:
        """Return what is to be seen now."""
        width = self._console.width // 2 - 2
        table = Table.grid(padding=(0, 2), expand=True)
        for _name in self._names:
            table.add_column(width=width, overflow="fold")
        table.add_row(*(Text(f"{printable(name)}:", "bold") for name in self._names))
        parts = list(self._texts)
        if not self.is_done:
            height = max(1, self._console.height - 3)
            wrapped = (text.wrap(self._console, width) for text in parts)
            parts = [Text("\n").join(lines[-height:]) for lines in wrapped]
        table.add_row(*parts)
        return table


def colour(expert: int) -> str:
    """Return the style of an expert's text."""
    style = _COLOURS[expert % len(_COLOURS)]
    return style if expert < len(_COLOURS) else f"underline {style}"
