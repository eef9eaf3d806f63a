"""Markdown as the Hub shows it: escaped text, tables, parts that fold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_MOST_ROWS = 16  # of a table that is not folded
_SPECIAL = re.compile(r"([\\`*\[\]<>|~#])|(?<!\w)_|_(?!\w)")


def escaped(text: str) -> str:
    """Return somebody else's text, such as a file's name, on one line and without a meaning here.

    Underscores inside words have none in GitHub's Markdown.
    """
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", text)


def code(text: str) -> str:
    """Return somebody else's text as inline code, in a table too."""
    return f"`{' '.join(text.replace('`', '').split())}`".replace("|", "\\|")


def with_code(text: str) -> str:
    """Return a sentence, of which parts may be somebody else's: escaped, but for its inline code."""
    # The odd parts were between two backticks; one without another to close it is in none.
    parts = re.split(r"`([^`]+)`", text)
    shown = (code(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))
    return " ".join("".join(shown).split())


# From the root, the home or another folder of somebody's disk; in quotes there may be spaces in it.
_START = r"(?:~|\.\.|[A-Za-z]:)?[/\\]"
_SEPARATOR = re.compile(r"[/\\]")
_LOCAL = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>{_START}[^"'\n]*)(?P=quote)|(?<![\w.:/\\<*-])(?P<bare>{_START}[^"'\n,#\]}}]+)"""
)


def without_local_paths(text: str) -> str:
    """Return a recipe's text as others may see it: of paths of somebody's disk the last part."""

    def shortened(found: re.Match[str]) -> str:
        path, quote = found["quoted"] or found["bare"], found["quote"] or ""
        # The base of an adapter is a path of its own.
        parts = [_SEPARATOR.split(part.rstrip("/\\ "))[-1] for part in path.split("+")]
        space = path[len(path.rstrip(" ")) :]
        return f"{quote}{'+'.join(f'./{part}' for part in parts)}{space}{quote}"

    return _LOCAL.sub(shortened, text)


def are_least(
    rows: Sequence[Sequence[float | None]], but: Collection[int] = ()
) -> list[list[bool]]:
    """Return which values of a table of perplexities are the least of their column.

    Args:
        rows: None where there is no value.
        but: Numbers of rows that are no model's, and not compared.
    """
    models = [row for number, row in enumerate(rows) if number not in but]
    least = [
        min((v for v in column if v is not None), default=None)
        for column in zip(*models, strict=True)
    ]
    return [
        [v is not None and v == m and number not in but for v, m in zip(row, least, strict=True)]
        for number, row in enumerate(rows)
    ]


def best_in_bold(
    rows: Sequence[Sequence[float | None]], but: Collection[int] = ()
) -> list[list[str]]:
    """Return the cells of a table of perplexities; of every column the least is bold.

    Args:
        rows, but: See `are_least`.
    """
    texts = [["" if value is None else f"{value:.2f}" for value in row] for row in rows]
    return [
        [f"**{text}**" if is_best else text for text, is_best in zip(row, best, strict=True)]
        for row, best in zip(texts, are_least(rows, but), strict=True)
    ]


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
