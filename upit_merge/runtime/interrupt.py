"""Ctrl-C in a command: the process ends at once, with one line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import click

# What a shell reports for a program that SIGINT has ended.
_EXIT_STATUS = 128 + signal.SIGINT


@contextlib.contextmanager
def ends_at_once(on_exit: Callable[[], str]) -> Iterator[None]:
    """End the process as soon as Ctrl-C is pressed, whatever it is doing.

    Python looks at signals only between two of its own instructions: a matrix product or a flush
    of gigabytes would be waited for. So a thread listens, and ends the process itself; what is on
    the disk then is what a kill would leave, which every stage can bear.

    Only inside a command (of click, hence also `mergekit-yaml`): a notebook or a program that
    calls us as a library gets its `KeyboardInterrupt` as ever.

    Args:
        on_exit: Tidies up, in a moment, and returns the line to print; may be empty.
    """
    in_command = click.get_current_context(silent=True) is not None
    if not in_command or threading.current_thread() is not threading.main_thread():
        yield
        return
    listening, telling = socket.socketpair()
    telling.setblocking(False)

    def listen() -> None:
        while told := listening.recv(64):
            if signal.SIGINT in told:
                line = on_exit()
                if line:
                    # The progress bar's line is left first.
                    sys.stderr.write(f"\n{line}\n")
                    sys.stderr.flush()
                os._exit(_EXIT_STATUS)

    thread = threading.Thread(target=listen, name="interrupt", daemon=True)
    earlier_handler = signal.signal(signal.SIGINT, lambda *_: None)
    earlier_descriptor = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_descriptor)
        signal.signal(signal.SIGINT, earlier_handler)
        telling.close()  # ends the thread
        thread.join()
        listening.close()
