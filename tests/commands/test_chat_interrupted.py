"""Ctrl-C in a conversation: one line, no traceback; what is cut off leaves nothing behind."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.talk import session, typed
from tests.support.warm import Program
from upit_merge.commands.chat import HELP
from upit_merge.report.spoken import Screen

# What Python runs before the command: it waits at a place, and says so.
WAITING = "print('here', flush=True); import time; time.sleep(100)"
AT_IMPORT = f"""
class Finder:
    def find_spec(self, name, *_):
        if name == "upit_merge.commands.chat":
            {WAITING}
import sys
sys.meta_path.insert(0, Finder())
"""
AT_LOADING = f"""
import upit_merge.commands.dialogue.voices as voices
def load(*_):
    {WAITING}
voices._load = load
"""
AT_ANSWER = f"""
import upit_merge.engine.generation as generation
def answer(*_, **__):
    {WAITING}
generation.Speaker.answer = answer
"""


@pytest.mark.parametrize("place", [AT_IMPORT, AT_LOADING, AT_ANSWER])
def test_it_ends_with_one_line(talker: Path, place: str) -> None:
    """While it gets ready; and in an answer that nobody can go on from, of several prompts."""
    words = ["chat", str(talker), "--prompt", "one", "--prompt", "two", "--device", "cpu"]
    program = f"{place}\nfrom upit_merge.cli.main import main\nmain({words!r})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process: Any = (
        subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
        if place is AT_IMPORT  # a warm program has imported all of it
        else Program("-c", program, **pipes)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert (out, told.strip()) == ("", "Interrupted.")
    assert process.returncode == 130


class Cut(io.StringIO):
    """A terminal on which Ctrl-C is pressed when some text has been written."""

    text: str | None = None
    place = 0

    def flush(self) -> None:
        if self.text is not None and self.text in self.getvalue()[self.place :]:
            self.text, self.place = None, len(self.getvalue())
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        ("/experts layers", "Share of", ""),
        ("/experts", "Share of", ""),
        ("/experts", "m", "\n"),
        ("hi", "m", "\n(stopped)\n"),
    ],
)
def test_what_is_shown_is_cut_off_for_good(
    talker: Path, command: str, text: str, told: str
) -> None:
    """rich would print it again before the next line, which would have the colour of the cut."""
    shown = Cut()
    screen = Screen(shown)
    screen.console = Console(
        file=shown, force_terminal=True, color_system="256", highlight=False, soft_wrap=True
    )
    talked, _ = session(talker, screen=screen, quiet=True)
    talked.say("hello")
    talked.command("experts on")
    shown.text, shown.place = text, len(shown.getvalue())
    talked.talk(typed(command, "/help"))
    assert shown.text is None
    after = shown.getvalue()[shown.place :]
    plain = re.sub(r"\x1b\[[\d;]*m", "", after)
    if command == "hi":  # the piece that was being printed, and the shares of what was said
        plain = re.sub("Share of.*┘\n", "", plain[plain.index("\n") :], flags=re.DOTALL)
    else:
        assert after.startswith("\x1b[0m")
    assert plain == f"{told}{HELP}\n\n"
