"""Room on the disk, and what the operating system refuses, in a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from upit_merge.errors import ResumableError


@contextlib.contextmanager
def explained_failures(out: Path) -> Iterator[None]:
    """Turn what the operating system refuses, disk or memory, into a sentence.

    Raises:
        ResumableError: instead of `OSError`, `MemoryError` and torch's own.
    """
    try:
        yield
    except OSError as error:
        raise explained(error, out) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory() from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words for it on the CPU
            raise
        raise _out_of_memory() from error


def _out_of_memory() -> ResumableError:
    return ResumableError(
        "The memory is used up; close other programs, use fewer threads (--num-threads) or lower "
        "router.batch_tokens, and run again."
    )


def explained(error: OSError, out: Path) -> ResumableError:
    """Return the sentence for what the operating system refused, as an error to raise."""
    if error.errno == errno.ENOSPC:
        return ResumableError(
            f"The disk of {out} is full; free some space and run the same command again."
        )
    if error.errno == errno.EMFILE:
        return ResumableError(
            "Too many files are open at once; raise the limit (`ulimit -n`) or --out-shard-size."
        )
    where = error.filename or out
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResumableError(f"{where} may not be read or written; check the rights of {out}.")
    return ResumableError(
        f"Reading or writing {where} failed ({error.strerror or error}); check the disk."
    )


def reserve(path: Path, num_bytes: int) -> None:
    """Create a file whose bytes are really there.

    Raises:
        ResumableError: the disk is full.
    """
    chunk = bytes(1 << 20)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return
            for start in range(0, num_bytes, len(chunk)):
                file.write(chunk[: num_bytes - start])
    except OSError as error:
        path.unlink(missing_ok=True)
        raise explained(error, path.parent) from error


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def missing_space(folder: Path, num_bytes: int, what: str) -> str | None:
    """Return a sentence if the disk of a folder has not that many bytes free."""
    free = free_bytes(folder)
    if free >= num_bytes:
        return None
    return (
        f"The disk of {folder} has {free / 1e9:.2f} GB free, but {what} "
        f"({num_bytes / 1e9:.2f} GB) must fit; free some space or choose another folder."
    )


def check_space(folder: Path, num_bytes: int, what: str) -> None:
    """Check that work fits the disk, before it starts.

    Raises:
        ResumableError: naming what is needed and what is free.
    """
    if sentence := missing_space(folder, num_bytes, what):
        raise ResumableError(sentence)
