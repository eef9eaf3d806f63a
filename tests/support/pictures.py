"""Pictures without their pixels: laying out and drawing them takes half the time of a tiny run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from upit_merge.report import figures

_save = figures._save


def blank(_drawn: Any, path: Path) -> None:
    """Write an empty picture; what is drawn was put together all the same."""
    Image.new("RGB", (1, 1)).save(path)


@contextlib.contextmanager
def kept_blank() -> Iterator[None]:
    """Draw nothing inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", blank)
        yield


@contextlib.contextmanager
def really_drawn() -> Iterator[None]:
    """Draw as ever inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", _save)
        yield
