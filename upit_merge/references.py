"""How a recipe names models: folders, Hub ids, globs, and adapters on a base."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from upit_merge.errors import UpitError
from upit_merge.recipe import ModelEntry


def split_reference(reference: str) -> tuple[str, str | None]:
    """A model's reference as (model, None), or as (base, adapter) if it is `BASE+ADAPTER`.

    A folder is taken as it is, whatever its name; the base is the longest part that is a folder.
    """
    plus = [index for index, character in enumerate(reference) if character == "+"]
    if not plus or _is_folder(reference):
        return reference, None
    folders = [index for index in plus if _is_folder(reference[:index])]
    at = folders[-1] if folders else plus[0]
    return reference[:at], reference[at + 1 :]


def _is_folder(reference: str) -> bool:
    return os.path.isdir(os.path.expanduser(reference))


def expand_models(entries: Iterable[ModelEntry]) -> list[ModelEntry]:
    """Replace every glob by the folders it matches, in step order (…-500 before …-1000).

    `BASE+GLOB` stands for that base with every adapter that the glob matches.

    Raises:
        UpitError: a glob matches no folder.
    """
    expanded: list[ModelEntry] = []
    for entry in entries:
        base, adapter = split_reference(entry.model)
        if _is_folder(adapter or entry.model) or not glob.has_magic(entry.model):
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
    """The folders a glob matches, or the one without magic, in step order."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(filter(os.path.isdir, found), key=_natural)


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.split(r"(\d+)", path)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
