"""What lets a killed run go on: what it was, and what of it is safe on the disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from upit_merge import __version__
from upit_merge.recipe import Recipe
from upit_merge.tensor_files import DenseModel

# At most this much work is lost by a kill. Flushing before there is much to flush also keeps the
# disk busy from the start, instead of all at the end.
SAVE_SECONDS = 10.0
SAVE_BYTES = 256 << 20

_JOURNALS = "journal-*.jsonl"

# Router settings that decide how much is computed at a time, but not what.
NO_MATTER = ("batch_tokens", "memory_gb")


def run_identity(
    recipe: Recipe,
    models: Sequence[DenseModel],
    max_shard_bytes: int,
    seed_samples: str | None = None,
) -> dict[str, Any]:
    """What decides a run's bytes: a run that differs in any of it cannot be continued.

    How much the router computes at a time is not among it: whoever ran out of memory may lower it.

    Input files are told apart by size and time of change, as build tools do: reading them would
    take as long as starting anew.
    """
    files = [path for model in models for path in model.files()]
    return {
        "upit-merge": __version__,
        "recipe": _without_sizes(recipe.model_dump(mode="json")),
        "--out-shard-size": max_shard_bytes,
        "what the tokenizer makes of the seed data": seed_samples,
        "file": file_states(files, recipe.router.data if recipe.router else ""),
    }


def _without_sizes(recipe: dict[str, Any]) -> dict[str, Any]:
    for name in NO_MATTER:
        (recipe["router"] or {}).pop(name, None)
    return recipe


def file_states(files: Iterable[Path], seed_data: str) -> dict[str, str]:
    """Size and time of change of files, and of the seed data's unless it is a dataset id."""
    paths = {path.resolve() for path in files}
    seeds = Path(os.path.expanduser(seed_data))
    if seed_data and seeds.is_dir():
        paths |= {path for path in seeds.resolve().rglob("*") if path.is_file()}
    elif seed_data and seeds.is_file():
        paths.add(seeds.resolve())
    stats = {str(path): path.stat() for path in sorted(paths)}
    return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two identities, in words; None if nothing does."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name != "file":
            return next(_changes(name, old, new))
        for path in {**(old or {}), **(new or {})}:
            was, is_now = (old or {}).get(path), (new or {}).get(path)
            if was != is_now:
                how = "was not part of it" if was is None else "changed since"
                return f"{path} {'is no longer part of it' if is_now is None else how}"
    return None


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


class Journal:
    """What is done of a run: Gram matrices and tensors that are flushed to the disk.

    One file of JSON lines for every process, only ever appended to. A line torn by a kill is not
    JSON and counts for nothing.

    Attributes:
        grams: By index of the FFN tensor, float64, (num_checkpoints, num_checkpoints).
        written: Names of the output's tensors that are complete.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.grams: dict[int, torch.Tensor] = {}
        self.written: set[str] = set()
        for path in sorted(folder.glob(_JOURNALS)):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._take(line)
        self._path = folder / _JOURNALS.replace("*", str(rank))
        self._torn = self._path.exists()

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        self.written.update(entry["written"])
        for tensor, gram in entry["grams"].items():
            self.grams[int(tensor)] = torch.tensor(gram, dtype=torch.float64)

    def append(self, grams: Mapping[int, torch.Tensor], written: Iterable[str]) -> None:
        """Record what is flushed already; the record itself is flushed before this returns."""
        entry = {
            "written": sorted(written),
            "grams": {str(tensor): gram.tolist() for tensor, gram in grams.items()},
        }
        with self._path.open("a", encoding="utf-8") as file:
            # The last line may be half a line, from a run that was killed.
            file.write("\n" * self._torn + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False


def has_progress(folder: Path) -> bool:
    """Whether a journal in this folder records anything."""
    return any(path.stat().st_size for path in folder.glob(_JOURNALS))


class Saver:
    """Journals finished tensors from time to time, beside the work.

    Flushing takes as long as the disk does; a thread of its own does it, so that reading and
    arithmetic go on meanwhile.

    Args:
        journal: Where to record; None records nothing.
        flush: Brings everything written so far to the disk.
    """

    def __init__(self, journal: Journal | None, flush: Callable[[], None] = lambda: None) -> None:
        self._journal = journal
        self._flush = flush
        self._grams: dict[int, torch.Tensor] = {}
        self._written: list[str] = []
        self._bytes = 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None
        self._saved_at = time.monotonic()

    def finished(
        self,
        written: Iterable[str] = (),
        grams: Mapping[int, torch.Tensor] | None = None,
        num_bytes: int = 0,
    ) -> None:
        """Tell what is done, and how many bytes were written; journals it if it is time to.

        Raises:
            OSError: an earlier flush failed.
        """
        self._written += written
        self._grams |= grams or {}
        self._bytes += num_bytes
        waited = time.monotonic() - self._saved_at
        if waited < SAVE_SECONDS and self._bytes < SAVE_BYTES:
            return
        if self._running is not None and not self._running.done():
            return
        self._start()

    def _start(self) -> None:
        if self._running is not None:
            self._running.result()
        grams, written = self._grams, self._written
        self._grams, self._written, self._bytes = {}, [], 0
        self._saved_at = time.monotonic()
        self._running = self._pool.submit(self._save, grams, written)

    def _save(self, grams: Mapping[int, torch.Tensor], written: Iterable[str]) -> None:
        if self._journal is None or not (grams or written):
            return
        self._flush()
        self._journal.append(grams, written)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._start()
        except OSError:
            if error is None:  # else the error that ends the work says more
                raise
        finally:
            self._pool.shutdown(wait=True)
        if error is None and self._running is not None:
            self._running.result()
