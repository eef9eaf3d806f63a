"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def dies_with_parent() -> Callable[[], object] | None:
    """For `subprocess`: on Linux a child is killed as soon as its parent is gone, however it went.

    Else a pipeline that was killed would leave its training behind, which would go on writing
    while the same command, given again, wants to. Elsewhere None: there the folder's lock tells.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: between fork and exec little may be done
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
