"""The command line in this process: what it does, what it refuses, and words that tests share."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from tests.conftest import Family
from tests.support.warm import ran_together
from upit_merge.cli.main import main

ROOT = Path(__file__).parents[2]


def invoke(*words: object) -> Result:
    """Run `upit-merge` with these words."""
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Result:
    """Run `upit-merge` and insist on its success."""
    result = invoke(*words)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result


def refused(*words: object) -> str:
    """Return the one sentence of a command that must fail, without a traceback."""
    result = invoke(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.output.startswith("Error: ")
    return result.output.removeprefix("Error: ").strip()


def extend(out: Path, family: Family, *words: object) -> list[object]:
    """The words that add the family's last checkpoint as an expert."""
    return ["extend", out, "--model", family.checkpoints[-1], "--quiet", *words]


def shrink(out: Path, family: Family, experts: int, *words: object) -> list[object]:
    """The words that merge experts until so many are left."""
    return ["shrink", out, "--experts", experts, "--data", family.seed_file(), "--quiet", *words]


def torchrun(*arguments: object, module: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, which talk through gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def two(*arguments: object, module: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun` starts, without its launcher: the same environment, and both to their end."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in (0, 1)]
    options = [{"env": {**os.environ, **size, **store, **own}, "cwd": ROOT} for own in each]
    both = ran_together((module, *arguments), options, timeout=300)
    status = max(abs(one.returncode) for one in both)
    said = ("".join(one.stdout for one in both), "".join(one.stderr for one in both))
    return subprocess.CompletedProcess([*map(str, arguments)], status, *said)
