"""What a command says at its end: which commands its user may want now."""

from __future__ import annotations


def tell_next(*steps: tuple[str, str]) -> None:
    """Print commands to go on with.

    Args:
        steps: What each is for, in a few words, and its command line.
    """
    for line in next_lines(*steps):
        print(line)


def next_lines(*steps: tuple[str, str]) -> list[str]:
    """Return what `tell_next` prints."""
    width = max(len(purpose) for purpose, _ in steps)
    # The purpose is not behind a `#`: in cmd, and in zsh as it comes, that would be an argument.
    return ["Next:", *(f"  {purpose:{width}}  {command}" for purpose, command in steps)]
