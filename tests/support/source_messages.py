"""The texts in the program's source, with an ellipsis for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "upit_merge"


def texts_in(tree: ast.AST) -> Iterator[str]:
    """Every string of a module; of an f-string the values are `…`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def source_messages() -> list[str]:
    """Of all modules, those of one line; what logging or a table's `format` fills in is `…` too."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        texts = texts_in(ast.parse(path.read_text(encoding="utf-8")))
        found += [re.sub(r"%[sd]|\{\w+\}", "…", text) for text in texts if "\n" not in text]
    return found
