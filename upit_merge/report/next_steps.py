"""What a command says at its end: which commands its user may want now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Set where a command is a step of a larger one, which says itself what comes next; a variable of
# the environment, because steps may be processes of their own.
_STEP = "UPIT_MERGE_STEP"


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
