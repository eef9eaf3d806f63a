"""Tell two runs apart: what decides their bytes, and what of it differs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def file_states(files: Iterable[Path], seed_data: str | None) -> dict[str, str]:
    """Return size and time of change of files, and of the seed data's unless it is a Hub id."""
    paths = {path.resolve() for path in files}
    seeds = Path(os.path.expanduser(seed_data or ""))
    if seed_data and seeds.is_dir():
        paths |= {path for path in seeds.resolve().rglob("*") if path.is_file()}
    elif seed_data and seeds.is_file():
        paths.add(seeds.resolve())
    stats = {str(path): path.stat() for path in sorted(paths)}
    return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return what differs between two identities, in words; None if nothing does.

    Args:
        before: As it was read back from a file.
        now: As it would be: JSON has texts for keys, and lists only.
    """
    return next(_differences(before, json.loads(json.dumps(now))), None)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if name == "file":
            yield from _file_changes(old or {}, new or {})
        elif old != new:
            yield from _changes(name, old, new)


def _file_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for path in {**before, **now}:
        if path not in now:
            yield f"{path} is no longer part of it"
        elif path not in before:
            yield f"{path} was not part of it"
        elif before[path] != now[path]:
            yield f"{path} changed since"


def _changes(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                inner = key if name == "recipe" else f"{name}.{key}"
                yield from _changes(inner, old.get(key), new.get(key))
    elif isinstance(old, list | dict) or isinstance(new, list | dict):
        yield f"{name} has changed"
    else:
        yield f"{name} was {_word(old)} and is {_word(new)}"


def _word(value: Any) -> str:
    return "not set" if value is None else str(value)
