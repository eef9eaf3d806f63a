"""One writer at a time: the lock of an output folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from upit_merge.errors import UpitError
from upit_merge.io.disk import explained
from upit_merge.io.untrusted import check_no_links

_OURS = ".upit-"  # what our hidden files and folders begin with
LOCK = f"{_OURS}lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        UpitError: another process holds it, the folder cannot be written to, or hidden files of
            ours in it are links, as in no folder that we have written.
    """
    path = folder / LOCK
    check_no_links(path)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UpitError(
            f"Another run is writing to {folder}; wait for it or choose another folder."
        ) from None
    except OSError as error:
        raise explained(error, folder) from error
    try:
        for hidden in folder.glob(f"{_OURS}*"):  # once nobody else is at work there
            check_no_links(hidden)
        yield
    finally:
        # Removed while it is held: after the release it may be somebody else's.
        with contextlib.suppress(OSError):  # Windows does not remove open files
            path.unlink(missing_ok=True)
        lock.release()


def release(folder: Path) -> None:
    """Remove the lock of a process that is about to end."""
    (folder / LOCK).unlink(missing_ok=True)
