"""A session on a real terminal, as somebody has it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.talk import TOKENS, assistant, family_that_talks, said_by_transformers, user
from tests.support.warm import Program
from upit_merge.errors import printable

pty = pytest.importorskip("pty", reason="Windows has no such terminals")

PATIENCE = 120  # seconds; importing transformers takes ten


class Terminal:
    """A process, what it shows, and a keyboard."""

    def __init__(self, *words: str) -> None:
        self._end, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
        for name in ("NO_COLOR", "COLORTERM"):
            environment.pop(name, None)
        self.process = Program(
            "upit_merge", *words, stdin=other, stdout=other, stderr=other, env=environment
        )
        os.close(other)
        self.shown = ""

    def until(self, pattern: str, patience: float = PATIENCE) -> str:
        """Return what is shown until then, from the last time on."""
        stop = time.monotonic() + patience
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            ready, _, _ = select.select([self._end], [], [], max(0, stop - time.monotonic()))
            assert ready, f"{pattern} does not show: {self.shown!r}"
            try:
                text = os.read(self._end, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                text = ""
            assert text, f"{pattern} never showed: {self.shown!r}"
            self.shown += text
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C until that is shown, as somebody would.

        Once is not always enough: Python's line editor looks whether there was a signal, and only
        then begins to wait for a key. What comes in between shows with the next key.
        """
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(pattern, patience=PATIENCE / 10)
        return self.until(pattern)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*words: object) -> Terminal:
        opened.append(Terminal(*map(str, words)))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def plain(text: str) -> str:
    """What is read of it: without colours and the terminal's line ends."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


def test_a_session(talker: Path, terminal: Callable[..., Terminal]) -> None:
    out = talker
    one = terminal("chat", out, "--greedy", "--max-new-tokens", TOKENS, "--device", "cpu")
    greeting = plain(one.until("> "))
    assert "out (float32 on cpu, 4 experts). /help for help, /quit to end." in greeting
    first = said_by_transformers(out, [user("hello")])
    one.type("hello\n")
    assert printable(first) in plain(one.until(r"\n(\x1b\S*)?> "))
    one.type("/experts\n")
    coloured = one.until(r"\n(\x1b\S*)?> ")
    assert re.search(r"\x1b\[(1;)?38;5;98mexpert 3", coloured)  # violet, as on the page
    # Ctrl-C on an empty line, an arrow key for the last message, and Ctrl-D.
    assert "/quit or Ctrl-D ends" in one.interrupt("ends")
    one.until("> ")
    one.type("\x1b[A\x1b[A\n")
    messages = [user("hello"), assistant(first), user("hello")]
    assert printable(said_by_transformers(out, messages)) in plain(one.until(r"\n(\x1b\S*)?> "))
    one.type("\x04")
    assert "upit-merge evaluate" in one.until("anew")
    assert one.process.wait(PATIENCE) == 0


def test_ctrl_c_stops_a_long_answer(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    """Which would go on for minutes; the session does."""
    family = family_that_talks(tmp_path, count=0, max_position_embeddings=1 << 20)
    settings = {"suppress_tokens": [0, 1, 2, 259, 260]}  # so that it never ends by itself
    (family.base / "generation_config.json").write_text(json.dumps(settings))
    one = terminal("chat", family.base, "--temperature", "9", "--max-new-tokens", 10**6)
    one.until("> ")
    one.type("hello\n")
    one.until("hello.{100}")
    one.interrupt("stopped")
    one.until("> ")
    one.type("\x03\x04")  # Ctrl-C and Ctrl-D at once, which Python sees as an end interrupted
    one.until("Next:")
    assert one.process.wait(PATIENCE) == 0


def test_ctrl_c_stops_what_is_shown_of_the_experts(
    tmp_path: Path, merge: Callable[..., Path], terminal: Callable[..., Terminal]
) -> None:
    """Of an answer that is longer than what a terminal takes before somebody reads it."""
    family = family_that_talks(tmp_path / "family", max_position_embeddings=1 << 12)
    out = merge(family.recipe(parameters={"num_experts": 4}))
    settings = {"suppress_tokens": [0, 1, 2, 259, 260]}  # so that it never ends by itself
    (out / "generation_config.json").write_text(json.dumps(settings))
    one = terminal("chat", out, "--temperature", "9", "--max-new-tokens", 600, "--quiet")
    one.until("> ")
    one.type("hello\n")
    one.until(r"cut off after 600 tokens.*\n(\x1b\S*)?> ")
    one.type("/experts\n")
    time.sleep(1)  # nobody reads
    one.type("\x03")
    # What is still to be shown is lost, but for the end of its colour.
    shown = one.until(r"\n(\x1b\S*)?> ")
    shown += one.interrupt("/quit or Ctrl-D ends")
    assert "Traceback" not in shown
    assert re.search(r"\x1b\[0m(\r\n)*(\x1b\[2m)(\r\n)*\(/quit", shown), shown[-200:]
    one.until("> ")
    one.type("/help\n")
    one.until("Ctrl-C stops an answer")
    one.type("/quit\n")
    assert one.process.wait(PATIENCE) == 0
