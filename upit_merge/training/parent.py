"""A training that a pipeline has started must not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

VARIABLE = "UPIT_DIES_WITH_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Be killed, on Linux, as soon as the process that started this one is gone.

    Else a pipeline that was killed would leave its training behind, which would go on writing
    while the same command, given again, wants to. Also behind a launcher, which is killed with the
    pipeline: each of the processes it started asks for itself. Elsewhere the folder's lock tells.
    """
    if sys.platform != "linux" or VARIABLE not in os.environ:
        return
    kill_with_parent()
    if os.getppid() == 1:  # gone before we asked
        sys.exit(1)


def kill_with_parent() -> None:
    """Do the same; for `subprocess` to call in a new process, whatever will run in it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
