"""Markdown as the Hub shows it: escaped text, tables, parts that fold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_MOST_ROWS = 16  # of a table that is not folded
_SPECIAL = re.compile(r"([\\`*\[\]<>|~#])|(?<!\w)_|_(?!\w)")


def escaped(text: str) -> str:
    """Return somebody else's text, such as a file's name, on one line and without a meaning here.

    Underscores inside words have none in GitHub's Markdown.
    """
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def code(text: str) -> str:
    """Return somebody else's text as inline code, in a table too."""
    return f"`{' '.join(text.replace('`', '').split())}`".replace("|", "\\|")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table, folded if it is long; the cells are Markdown.

    Args:
        columns: Their titles; with a leading `>` the column is aligned to the right.
    """
    titles = " | ".join(title.removeprefix(">") for title in columns)
    rule = "|".join("---:" if title.startswith(">") else "---" for title in columns)
    lines = [f"| {' | '.join(cell or ' ' for cell in row)} |" for row in rows]
    text = "\n".join([f"| {titles} |", f"|{rule}|", *lines])
    return folded(f"All {len(lines)} rows", text) if len(lines) > _MOST_ROWS else text


def folded(summary: str, text: str) -> str:
    """Hide Markdown until it is clicked on."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def fenced(text: str, language: str) -> str:
    """Return a block of code, in a fence that the text itself cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def picture(file: str, alternative: str) -> str:
    """Show a picture that lies beside the card."""
    return f"![{escaped(alternative)}]({file})"


def amount(count: int) -> str:
    """Round a large number to three digits: 46.7 B."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * limit:  # what would be rounded to 1,000 of the next unit
            return f"{count / limit:.3g}{unit}"
    return str(count)
