"""An answer on the terminal: as it comes, and in the colours or numbers of the experts it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from upit_merge.engine.choices import Choices
from upit_merge.engine.generation import Answer
from upit_merge.errors import printable
from upit_merge.report.choice_tables import share_tables
from upit_merge.report.terminal_palette import Looks

# Two answers stand side by side on a terminal so wide.
_WIDE = 100


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

    def looks(self, num_experts: int) -> Looks:
        """Return how the experts of a mixture look here: all alike where there are no colours."""
        if not self.has_colours:
            return Looks((Style(),) * num_experts, are_distinct=False)
        return Looks.of(num_experts, str(self.console.color_system))

    def piece(self, text: str, owner: int | None = None, num_experts: int = 0) -> None:
        """Print what an answer has more.

        Args:
            owner: The expert in whose colour; behind its number where colours do not tell.
            num_experts: All that there are.
        """
        if not text:  # the first bytes of a character
            return
        looks = self.looks(num_experts)
        is_new = owner is not None and owner != self._owner and not looks.are_distinct
        self._owner = owner
        style = Style() if owner is None else looks.styles[owner]
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

    def interrupted(self) -> None:
        """Leave what Ctrl-C has cut off: its line, its colour, and what rich would print again."""
        if self._columns is not None:
            return
        with self.console.capture():
            pass
        if self.has_colours:
            self.console.file.write("\x1b[0m")
        self.finish()

    def experts(self, answer: Answer, num_experts: int, layer: int | None = None) -> None:
        """Print an answer by the experts that weigh most for its tokens.

        Args:
            layer: In this layer; without it, in all together.
        """
        assert answer.choices is not None
        owners = answer.choices.owners(num_experts, layer).tolist()
        for number, piece in enumerate(answer.pieces):
            owner = owners[number] if number < len(owners) else None
            self.piece(piece, owner, num_experts)
        self.finish()

    def shares(
        self,
        choices: Choices,
        num_experts: int,
        *,
        layer: int | None = None,
        by_layer: bool = False,
    ) -> None:
        """Print what share of all choices of the answer's tokens each expert has.

        Args:
            layer: In this layer; without it, in all together.
            by_layer: A row for each layer, too.
        """
        styles = self.looks(num_experts).styles
        self.finish()
        for table in share_tables(
            choices, num_experts, self.console, styles, layer=layer, by_layer=by_layer
        ):
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

    def add(self, text: str, style: str | Style) -> None:
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
