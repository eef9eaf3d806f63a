"""Small files, replaced whole: whoever reads one sees the old or the new, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON; an older file is replaced in one step."""
    replace_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Return JSON as we write it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of our own; an empty one if there is none, or half of one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def replace_text(path: Path, text: str) -> None:
    """Write a text file by renaming a finished one into its place."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)  # in a folder from elsewhere it may be a link to anything
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # Renamed first and written later, a power cut would leave an empty file.
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_unless_there(path: Path, text: str) -> None:
    """Write a text file, but leave one that has this very text as it is, with its time of change."""
    if not path.is_file() or path.read_bytes() != text.encode():
        replace_text(path, text)


def sync_folder(folder: Path) -> None:
    """Flush the files of a folder, and their names, to the disk."""
    if os.name == "nt":  # which flushes neither folders nor files opened for reading
        return
    for path in [*folder.iterdir(), folder]:
        sync_file(path)


def sync_file(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
