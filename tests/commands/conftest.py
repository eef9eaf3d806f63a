"""What several tests of commands begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Family


@pytest.fixture
def here(family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base`, `sft/checkpoint-500` to `-1500` and nothing else, as the current one."""
    monkeypatch.chdir(family.root)
    return family.root


@pytest.fixture(scope="session")
def talking_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models that can be talked to; do not write into them."""
    from tests.support.talk import family_that_talks

    return family_that_talks(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def talker(talking_family: Family, merge: Callable[..., Path]) -> Path:
    """A mixture of four experts that can be talked to, the folder `out`."""
    return merge(talking_family.recipe(parameters={"num_experts": 4}))
