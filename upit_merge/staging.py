"""The output folder: built aside, moved into place last, never half there."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from upit_merge.errors import UpitError

LOG = logging.getLogger(__name__)

STAGING = ".upit-staging"
REPORT = "upit_report.json"
_LOCK = ".upit-lock"


@contextlib.contextmanager
def staged_output(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to build in; on success its files become those of `out`, else nothing does.

    The staging folder is inside `out`, hence on the same disk: moving is renaming. `config.json`
    comes last, so that an interrupted move does not leave a folder that loads as a model.

    Args:
        out: The output folder; created if needed.
        overwrite: Replace an earlier output of this program (a folder with a report in it).

    Raises:
        UpitError: `out` is not empty, is no folder, is in use, or the disk is full.
    """
    refuse_occupied(out, overwrite=overwrite)
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpitError(
            f"The output folder {out} cannot be created ({error.strerror}); choose another."
        ) from None
    done = False
    try:
        with exclusive(out):
            refuse_occupied(out, overwrite=overwrite)  # another run may have just finished
            staging = out / STAGING
            # Left by a run that was killed; the lock says that nobody is using it.
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir()
                yield staging
                _move_into_place(staging, out, overwrite)
                done = True
            except OSError as error:
                raise _explained(error, out) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if not done:
            for folder in created:
                _remove_if_empty(folder)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        UpitError: another process holds it, or the folder cannot be written to.
    """
    path = folder / _LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UpitError(
            f"Another run is writing to {folder}; wait for it or choose another folder."
        ) from None
    except OSError as error:
        raise _explained(error, folder) from error
    try:
        yield
    finally:
        # Removed while it is held: after the release it may be somebody else's.
        with contextlib.suppress(OSError):  # Windows does not remove open files
            path.unlink(missing_ok=True)
        lock.release()


def refuse_occupied(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that holds anything but, with `overwrite`, an earlier output.

    Raises:
        UpitError: naming what is there.
    """
    if out.is_file():
        raise UpitError(f"The output {out} is a file; give a folder.")
    if not out.is_dir():
        return
    present = sorted(path.name for path in out.iterdir() if path.name not in (STAGING, _LOCK))
    if not present:
        return
    if not overwrite:
        raise UpitError(
            f"The output folder {out} is not empty (it holds {present[0]}); choose a new folder, "
            "or replace an earlier output with `upit-merge run --overwrite`."
        )
    if REPORT not in present:
        raise UpitError(
            f"The output folder {out} was not written by upit-merge (it has no {REPORT}); choose "
            "another folder."
        )


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        LOG.debug("left %s in place", folder)


def _explained(error: OSError, out: Path) -> UpitError:
    if error.errno == errno.ENOSPC:
        return UpitError(f"The disk of {out} is full; free some space and run again.")
    if error.errno == errno.EMFILE:
        return UpitError(
            "Too many files are open at once; raise the limit (`ulimit -n`) or --out-shard-size."
        )
    where = error.filename or out
    return UpitError(f"Writing {where} failed ({error.strerror or error}); check the disk.")


def _move_into_place(staging: Path, out: Path, overwrite: bool) -> None:
    if overwrite:
        (out / "config.json").unlink(missing_ok=True)
        for name in _files_of(out / REPORT):
            (out / name).unlink(missing_ok=True)
    names = sorted(path.name for path in staging.iterdir())
    for name in sorted(names, key=lambda name: name == "config.json"):
        os.replace(staging / name, out / name)


def _files_of(report: Path) -> list[str]:
    """The files an earlier report says it came with."""
    try:
        files = json.loads(report.read_text(encoding="utf-8")).get("files", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in files if isinstance(name, str) and Path(name).name == name]


def reserve(path: Path, num_bytes: int) -> None:
    """Create a file whose bytes are really there.

    Raises:
        UpitError: the disk is full.
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
        raise _explained(error, path.parent) from error


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse work that cannot fit the disk, before it starts.

    Raises:
        UpitError: naming what is needed and what is free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UpitError(
            f"The disk of {folder} has {free / 1e9:.2f} GB free, but {what} "
            f"({num_bytes / 1e9:.2f} GB) must fit; free some space or choose another folder."
        )
