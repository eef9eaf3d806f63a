"""How a recipe names models: folders, Hub ids, globs, and adapters on a base."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from upit_merge.config.recipe import ModelEntry
from upit_merge.errors import UpitError
from upit_merge.io.hub import is_folder, split_reference


def expand_models(entries: Iterable[ModelEntry]) -> list[ModelEntry]:
    """Replace every glob by the folders it matches, in step order (…-500 before …-1000).

    `BASE+GLOB` stands for that base with every adapter that the glob matches.

    Raises:
        UpitError: a glob matches no folder.
    """
    expanded: list[ModelEntry] = []
    for entry in entries:
        base, adapter = split_reference(entry.model)
        if is_folder(adapter or entry.model) or not glob.has_magic(entry.model):
            names = [entry.model]
        elif not (names := _matches(entry.model)) and adapter is not None:
            names = [f"{base}+{name}" for name in _matches(adapter)]
        if not names:
            raise UpitError(
                f"models: {entry.model} matches no folder (looked in {Path.cwd()}); correct the "
                "pattern or the working directory."
            )
        expanded += [entry.model_copy(update={"model": name}) for name in names]
    return expanded


def _matches(pattern: str) -> list[str]:
    """Return the folders a glob matches, or the one without magic, in step order.

    GGUF files are returned if there is nothing else: `resolve` says what can be done with them.
    """
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True), key=_natural)
    folders = [path for path in paths if os.path.isdir(path)]
    return folders or [path for path in paths if path.lower().endswith(".gguf")]


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares runs of digits as numbers."""
    parts = re.split(r"(\d+)", path)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
