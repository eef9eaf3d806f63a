"""SECURITY.md and the docstring of io/untrusted.py name files, functions and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import upit_merge.io.untrusted as untrusted

ROOT = Path(__file__).parents[2]
# `path/file.py`: `name`, `name`
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.py)`((?::| and|,)? ?(?:`\w+`(?:, )?)*)")


def named_in(text: str) -> list[tuple[str, str | None]]:
    """Every (file, name defined in it) that a text has; None for the file alone."""
    pairs: list[tuple[str, str | None]] = []
    for file, names in NAMED.findall(text):
        pairs += [(file, name) for name in re.findall(r"`(\w+)`", names)] or [(file, None)]
    return pairs


PAGES = {
    "SECURITY.md": (ROOT / "SECURITY.md").read_text(encoding="utf-8"),
    "untrusted.py": untrusted.__doc__ or "",
}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page: str) -> None:
    pairs = named_in(PAGES[page])
    assert len(pairs) > 12
    for file, name in pairs:
        path = next((p for p in (ROOT / file, ROOT / "upit_merge" / file) if p.is_file()), None)
        assert path, file
        if name is not None:
            pattern = rf"^(?:def|class) {name}\b"
            assert re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE), (file, name)
