"""Markdown of the generated pages: tables, and the anchors that GitHub gives headings."""

from __future__ import annotations

import re

NOTE = "<!-- Written by docs/generate.py: change the descriptions in the program instead. -->"


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
