"""The tree stays one that can be read: short files, few places, each where CONTRIBUTING says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "upit_merge"


@pytest.mark.parametrize("tree", ["upit_merge", "tests", "benchmarks", "docs"])
def test_no_file_is_over_400_lines(tree: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in (ROOT / tree).rglob("*.py")
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_the_package_s_root_holds_little() -> None:
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files <= {"__init__.py", "__main__.py", "errors.py"}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert len(folders) <= 17
    blocks = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")
    (tree,) = [block for block in blocks if block.startswith("\nupit_merge/\n")]
    assert folders == set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


def test_tests_do_not_import_from_tests() -> None:
    """What several need lies in `tests/support/` or a `conftest.py`."""
    importing = re.compile(r"^\s*(from|import) tests\.\S*\btest_", re.MULTILINE)
    paths = (ROOT / "tests").rglob("*.py")
    assert [p.name for p in paths if importing.search(p.read_text(encoding="utf-8"))] == []
