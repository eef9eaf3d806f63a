"""Files that a command writes its results to, wherever the user says."""

from __future__ import annotations

import json
import os
from pathlib import Path

from upit_merge.errors import UpitError


def check_is_not_data(path: Path, data: str) -> None:
    """Refuse to write results over the data they are of, or over anybody's records.

    Args:
        path: Where results are to be written.
        data: A file, a folder, or the id of a dataset.

    Raises:
        UpitError: `path` is the data, one of its files, or a file of results in JSON's place that
            holds anything but one JSON object.
    """
    source = Path(os.path.expanduser(data)) if data else None
    if source is not None and source.exists():
        place = path.resolve()
        if source.resolve() in (place, *place.parents):
            raise UpitError(
                f"{path} would be written over the data in {data}; choose another name."
            )
    if path.suffix.lower() in (".json", ".jsonl") and path.is_file() and not _is_object(path):
        raise UpitError(
            f"{path} exists and is no file of results, which are one JSON object; choose another "
            "name, or remove it."
        )


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False
