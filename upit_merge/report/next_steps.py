"""What a command says at its end: which commands its user may want now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from upit_merge.errors import argument

# Set where a command is a step of a larger one, which says itself what comes next; a variable of
# the environment, because steps may be processes of their own.
_STEP = "UPIT_MERGE_STEP"
# Stand-ins for data that is not known here.
HELD_OUT, SEED = "HELD-OUT-DATA", "SEED-DATA"


@contextlib.contextmanager
def only_steps() -> Iterator[None]:
    """Let commands that are run inside, or started as processes, not say what comes next."""
    before = os.environ.get(_STEP)
    os.environ[_STEP] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_STEP]
        else:
            os.environ[_STEP] = before


def held_out_beside(data: str | None) -> str:
    """Return held-out data for a command: what `split` wrote beside the seed data, or a stand-in."""
    if data is not None:
        folder = Path(data).expanduser().parent
        for found in sorted(folder.glob("held-out.*")) if folder.is_dir() else ():
            return argument(found.as_posix())
    return HELD_OUT


def seed_data(data: str | None) -> str:
    """Return seed data for a command: what was used before, or a stand-in."""
    return SEED if data is None else argument(data)


def tell_next(*steps: tuple[str, str]) -> None:
    """Print commands to go on with.

    Args:
        steps: What each is for, in a few words, and its command line.
    """
    if os.environ.get(_STEP):
        return
    for line in next_lines(*steps):
        print(line)


def next_lines(*steps: tuple[str, str]) -> list[str]:
    """Return what `tell_next` prints."""
    width = max(len(purpose) for purpose, _ in steps)
    # The purpose is not behind a `#`: in cmd, and in zsh as it comes, that would be an argument.
    return ["Next:", *(f"  {purpose:{width}}  {command}" for purpose, command in steps)]
