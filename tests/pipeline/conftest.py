"""What the tests of pipelines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Family
from tests.support.pipelines import Written, writer


@pytest.fixture
def written(tmp_path: Path, four: Family) -> Written:
    return writer(tmp_path, four)
