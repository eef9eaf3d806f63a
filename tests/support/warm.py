"""Programs that start at once: forked off a process that has imported what they need.

A new Python takes seconds to import torch, transformers and mergekit, and tests start dozens. On
Linux one process for each of pytest's imports all of it, starts no thread, and forks; what it forks
is a program like any other: its own session, arguments, environment, folder and standard streams.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.support.pictures import blank
from upit_merge.report import figures

ROOT = Path(__file__).parents[2]
_MOST_BYTES = 1 << 20
_IMPORTED = (
    "mergekit.scripts.run_yaml",
    "torch.distributed",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "upit_merge.cli.main",
    "upit_merge.commands.chat",
    "upit_merge.commands.evaluate",
    "upit_merge.commands.run",
    "upit_merge.commands.router",
    "upit_merge.pipeline.run",
)


class Program:
    """A running program, with what `subprocess.Popen` has of it.

    Args:
        words: A module and its arguments; or `-c`, code and its arguments.
        stdin, stdout, stderr: Descriptors, or files; `subprocess.PIPE` for the latter two. A
            terminal as standard input becomes the program's own.
        env, cwd: As they are here by default.
    """

    def __init__(
        self,
        *words: object,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._told, telling = os.pipe()
        self._rest = b""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, telling)
            self.stdout, out = _stream(stdout, 1, stack)
            self.stderr, err = (
                (None, out) if stderr == subprocess.STDOUT else _stream(stderr, 2, stack)
            )
            request = {
                "words": [str(word) for word in words],
                "env": dict(os.environ if env is None else env),
                "cwd": str(cwd or Path.cwd()),
            }
            _, inlet = _stream(stdin, 0, stack)
            message = json.dumps(request).encode()
            assert len(message) < _MOST_BYTES
            socket.send_fds(_server(), [message], [inlet, out, err, telling])
        self.pid = int(self._line(None) or 0)
        assert self.pid, "the process that forks has ended"

    def _line(self, until: float | None) -> bytes | None:
        """Return the next line of what is told of the program; None if there is none until then."""
        while b"\n" not in self._rest:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._told], [], [], left)[0]:
                return None
            more = os.read(self._told, 100)
            if not more:
                return b""
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            line = self._line(None if timeout is None else time.monotonic() + timeout)
            if line is None:
                assert timeout is not None
                raise subprocess.TimeoutExpired("program", timeout)
            self.returncode = int(line)
            os.close(self._told)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what the program still says, and wait for its end; of two pipes, one at a time."""
        said = ["" if stream is None else stream.read() for stream in (self.stdout, self.stderr)]
        self.wait(timeout)
        return said[0], said[1]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def _stream(
    given: int | IO[Any] | None, number: int, stack: contextlib.ExitStack
) -> tuple[IO[str] | None, int]:
    """Return our end of a stream, if it is a pipe, and the program's; that one is closed here."""
    if given == subprocess.PIPE:
        ours, theirs = os.pipe()
        stack.callback(os.close, theirs)
        return open(ours, encoding="utf-8", errors="replace"), theirs
    if given == subprocess.DEVNULL:
        theirs = os.open(os.devnull, os.O_RDWR)
        stack.callback(os.close, theirs)
        return None, theirs
    if given is None:
        return None, number
    return None, given if isinstance(given, int) else given.fileno()


def ran(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; see `Program`. What it says on both streams is kept."""
    return ran_together(words, [options])[0]


def ran_together(
    words: Sequence[object], options: Sequence[Mapping[str, Any]], timeout: float | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run the same words as several programs at once, each with its options, to their end."""
    with contextlib.ExitStack() as stack:
        files = [
            [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in options
        ]
        programs = [
            Program(*words, stdout=out, stderr=err, **own)
            for (out, err), own in zip(files, options, strict=True)
        ]
        found = []
        for program, streams in zip(programs, files, strict=True):
            status = program.wait(timeout)
            for file in streams:
                file.seek(0)
            said = [file.read() for file in streams]
            found.append(subprocess.CompletedProcess([*map(str, words)], status, *said))
        return found


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
        # As many threads as a program wants are started in it, none before.
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    theirs.close()
    atexit.register(ours.close)
    return ours


# ---- the process that forks --------------------------------------------------------------------


def _serve(connection: socket.socket) -> None:
    while True:
        message, fds, _, _ = socket.recv_fds(connection, _MOST_BYTES, 4)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            _watch(json.loads(message), fds)
        for fd in fds:
            os.close(fd)


def _watch(request: dict[str, Any], fds: list[int]) -> None:
    """Fork the program, and tell its number and how it ends."""
    *streams, telling = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(telling)
        _become(request, streams)
    for fd in streams:  # else a pipe would not be at its end with the program
        os.close(fd)
    for null in range(3):
        os.close(null)
    os.write(telling, f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(telling, f"{status}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Be the program."""
    status = 1
    try:
        os.setsid()
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        for fd in {*streams} - {0, 1, 2}:
            os.close(fd)
        if os.isatty(0):
            import fcntl  # which Windows lacks
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                open(number, "wb", closefd=False),  # noqa: SIM115
                encoding="utf-8",
                errors=errors,
                line_buffering=number == 2 or os.isatty(1),
                write_through=bool(os.environ.get("PYTHONUNBUFFERED")),
            )
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        if threads := os.environ.get("OMP_NUM_THREADS"):
            import torch

            torch.set_num_threads(int(threads))
        status = _run(request["words"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run(words: list[str]) -> int:
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [*words]
            sys.modules.pop(words[0], None)  # else runpy warns
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are not waited for
    for name in _IMPORTED:
        importlib.import_module(name)
    figures._save = blank  # type: ignore[assignment]
    gc.freeze()  # what is imported is no program's garbage
    _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
