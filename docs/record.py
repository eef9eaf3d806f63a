"""Records first-mixture.md again: `python docs/record.py`, after what a command prints has changed.

On a terminal of its own, made here, in a new folder with a small base model, three checkpoints and
data, which `upit-merge demo`'s training makes (a few minutes); or in FOLDER, if that is given, which
has such things already. Every block of the page that begins with a command is replaced by what that
prints now. Needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parent / "first-mixture.md"
COLUMNS, LINES = 96, 60

# What is run, in this order, and what is typed when a question, or a prompt, has been printed.
SESSION: Mapping[str, Sequence[str]] = {
    "ls": (),
    "upit-merge init .": ("", "", ""),
    "upit-merge plan recipe.yml out/": (),
    "upit-merge run recipe.yml out/": (),
    "upit-merge chat out/ --greedy --max-new-tokens 40": (
        "Question: 123 + 45? Units:",
        "/quit",
    ),
}

_BLOCK = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>])")
_WAITING = re.compile(r"(?::|\?|>) ?$")  # the end of what asks for an answer
_PATIENCE = 1.0  # seconds in which nothing more is printed, before an answer is typed
_BAR = re.compile(r"\d+%\|")


def in_terminal(
    command: Sequence[str], answers: Sequence[str], folder: Path, limit: float = 1800
) -> tuple[int, str]:
    """Run a command on a terminal of its own.

    Args:
        answers: What is typed, each when the command waits.
        folder: Where it is run.
        limit: Seconds after which it is ended.

    Returns:
        Its exit status, and what was on the screen: without colours and progress bars.
    """
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, cwd=folder, env=environment, close_fds=True,
        start_new_session=True,
    )  # fmt: skip
    os.close(its)
    printed, left, until = b"", list(answers), time.monotonic() + limit
    try:
        while time.monotonic() < until:
            ready, _, _ = select.select([own], [], [], _PATIENCE)
            if ready:
                try:
                    found = os.read(own, 65536)
                except OSError:  # what Linux says for the end
                    found = b""
                if not found:
                    break
                printed += found
            elif left and _WAITING.search(screen(printed).rpartition("\n")[2]):
                os.write(own, f"{left.pop(0)}\n".encode())
        else:
            raise TimeoutError(f"{shlex.join(command)} has not ended:\n{screen(printed)}")
    finally:
        os.close(own)
        if process.poll() is None and time.monotonic() >= until:
            process.kill()
    return process.wait(timeout=limit), screen(printed)


def screen(printed: bytes) -> str:
    """Return what is read on the screen in the end."""
    text = _ESCAPES.sub("", printed.decode(errors="replace")).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    kept = [line for line in lines if not _BAR.search(line)]
    asked = text.rpartition("\n")[2].endswith(" ") and kept and kept[-1]
    return "\n".join(kept) + (" " if asked else "")


def words_of(command: str) -> list[str]:
    """Return what is executed for a line of the page."""
    name, *words = shlex.split(command)
    return [sys.executable, "-m", "upit_merge", *words] if name == "upit-merge" else [name, *words]


def commands_of(page: str) -> list[str]:
    """Return the commands that the page shows."""
    return [command for command, _output in _BLOCK.findall(page)]


def prepare(folder: Path) -> None:
    """Make a base, three checkpoints of one run, and data."""
    from upit_merge.demo.corpus import load_domains, write_texts
    from upit_merge.demo.training import TrainingBudget, train_demo_models

    domains = load_domains()
    budget = TrainingBudget(base_steps=300, sft_rounds=1, sft_steps=100)
    train_demo_models(folder, domains, budget=budget)
    write_texts(folder / "train.jsonl", domains, [domain.train[:100] for domain in domains])


def record(page: str, folder: Path) -> str:
    """Return the page with what its commands print in a folder.

    Commands that this version has not keep what is there.
    """
    from upit_merge.cli.main import main

    for command, answers in SESSION.items():
        name, *words = shlex.split(command)
        if name == "upit-merge" and words[0] not in main.commands:
            print(f"left as it is: {command}")
            continue
        status, output = in_terminal(words_of(command), answers, folder)
        if status:
            raise SystemExit(f"{command} failed:\n{output}")
        if str(folder) in output:
            raise SystemExit(f"{command} prints where it was run:\n{output}")
        start = f"```console\n$ {command}\n"
        at = page.index(start) + len(start)
        end = page.index("```", at)
        page = f"{page[:at]}{output.strip(chr(10))}\n{page[end:]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="with base/, sft/ and data")
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        folder = given or Path(scratch)
        if given is None:
            prepare(folder)
        PAGE.write_text(record(PAGE.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main()
