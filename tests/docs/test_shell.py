"""Commands in pages work as printed: in bash, zsh, PowerShell and cmd."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.source_messages import source_messages

ROOT = Path(__file__).parents[2]
# For who uses the program; CONTRIBUTING.md and benchmarks/ are for a developer's bash.
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("recipes/README.md", "README.md")),
]
# Making an environment is each system's own.
ENVIRONMENT = {"python3 -m venv .venv", "source .venv/bin/activate", ".venv\\Scripts\\activate"}
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:pip|upit-merge|mergekit-yaml|hf|lm_eval|accelerate|torchrun) [^`]+)`")
# What is said in one of these shells, and not in the others.
FOREIGN = {
    "a comment, an argument in cmd and in zsh as it comes": r"(^|\s)#",
    "single quotes, a part of the argument in cmd": r"'",
    "&&, an error in Windows PowerShell": r"&&",
    "a line that goes on, each shell's own": r"\\$|`$|\^$",
    "a variable, each shell's own": r"\$\w|%\w+%",
    "a home folder or glob, which cmd does not expand": r"(^|\s)~/|\s\S*\*",
    "a path into an environment": r"\.venv/",
}


def problems(line: str) -> list[str]:
    return [what for what, pattern in FOREIGN.items() if re.search(pattern, line)]


def commands(page: Path) -> list[str]:
    """Lines of blocks that are no program's output, and commands within the text."""
    text = page.read_text(encoding="utf-8")
    shell = ("", "bash", "sh")
    blocks = [block for _indent, language, block in _BLOCK.findall(text) if language in shell]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    sessions = [block for _indent, language, block in _BLOCK.findall(text) if language == "console"]
    lines += re.findall(r"^\$ (.*)$", "".join(sessions), re.MULTILINE)
    inline = [re.sub(r"\s+", " ", found) for found in _INLINE.findall(_BLOCK.sub("", text))]
    found = [line for line in [*lines, *inline] if line and "Error" not in line]
    return [line for line in found if line not in ENVIRONMENT]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_work_in_every_shell(page: Path) -> None:
    assert {line: problems(line) for line in commands(page) if problems(line)} == {}


def test_commands_in_messages_do_too() -> None:
    said = [command for text in source_messages() for command in _INLINE.findall(text)]
    assert len(said) > 5
    assert {line: problems(line) for line in said if problems(line)} == {}


@pytest.mark.parametrize(
    "line",
    [
        "upit-merge verify out/    # comment",
        "pip install '.[train]'",
        "cd demo && upit-merge verify out/",
        "upit-merge run a.yml \\",
        "upit-merge run $RECIPE out/",
        "upit-merge chat ~/out",
        ".venv/bin/pip install .",
    ],
)
def test_what_would_not_is_found(line: str) -> None:
    """The control of the tests above."""
    assert problems(line)
