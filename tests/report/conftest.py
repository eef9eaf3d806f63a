"""Here pictures are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pictures import really_drawn


@pytest.fixture(scope="module", autouse=True)
def _pictures() -> Iterator[None]:
    with really_drawn():
        yield
