"""What several tests of commands begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Family


@pytest.fixture
def here(family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base`, `sft/checkpoint-500` to `-1500` and nothing else, as the current one."""
    monkeypatch.chdir(family.root)
    return family.root
