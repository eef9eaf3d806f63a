"""What lets a killed run go on: what it was, and what of it is safe on the disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

# At most this much work is lost by a kill. Flushing before there is much to flush also keeps the
# disk busy from the start, instead of all at the end.
SAVE_SECONDS = 10.0
SAVE_BYTES = 256 << 20

_JOURNALS = "journal-*.jsonl"


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
    """Return whether a journal in this folder records anything."""
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
