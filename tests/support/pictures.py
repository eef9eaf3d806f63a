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
def _saved_by(save: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", save)
        yield


def kept_blank() -> contextlib.AbstractContextManager[None]:
    """Draw nothing inside."""
    return _saved_by(blank)


def really_drawn() -> contextlib.AbstractContextManager[None]:
    """Draw as ever inside."""
    return _saved_by(_save)
