"""What a command says at its end: which commands its user may want now."""

from __future__ import annotations

from pathlib import Path


def tell_next(*steps: tuple[str, str]) -> None:
    """Print commands to go on with, and what each is for.

    Args:
        steps: A command line, and its purpose in a few words.
    """
    width = max(len(command) for command, _ in steps)
    print("Next:")
    for command, purpose in steps:
        print(f"  {command:{width}}  # {purpose}")


def argument(path: Path | str) -> str:
    """Return a path as it can be typed in any shell."""
    text = str(path)
    return f'"{text}"' if not text or set(text) & set(" '()[]{}&;|<>*?!$`#~^%\t") else text
