"""What the plug-in costs every interpreter start, and every import after it.

Two environments that differ in one file, the `.pth` that imports the hook, start Python in turn.

    python benchmarks/startup.py [--runs 200]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import venv
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "upit_merge"
# Bytecode is cached, as pip does when it installs.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def make_environment(folder: Path, *, with_hook: bool) -> Path:
    """A bare environment that sees the package; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "upit_merge").symlink_to(PACKAGE)
    if with_hook:
        pth = PACKAGE / "upit_merge_mergekit.pth"
        (site / pth.name).write_text(pth.read_text())
    return folder / "bin" / "python"


def seconds(python: Path, code: str) -> float:
    started = time.perf_counter()
    subprocess.run([python, "-c", code], check=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        without = make_environment(Path(temporary) / "without", with_hook=False)
        with_hook = make_environment(Path(temporary) / "with", with_hook=True)
        print(f"Python {sys.version.split()[0]}, {runs} pairs, in turn; milliseconds")
        for python in (without, with_hook):  # compile and cache once
            seconds(python, "pass")
        pairs = [(seconds(without, "pass"), seconds(with_hook, "pass")) for _ in range(runs)]
        extra = sorted(1000 * (b - a) for a, b in pairs)
        plain = statistics.median(1000 * a for a, _ in pairs)
        low, high = extra[len(extra) // 4], extra[3 * len(extra) // 4]
        print(
            f"start: {plain:.2f} without; the hook adds {statistics.median(extra):.3f} "
            f"(quartiles {low:.3f} to {high:.3f})"
        )
        # Later imports of other modules ask the hook once each: too little to see in a process.
        asked = timeit.repeat(
            "find('json.decoder', None)",
            "from upit_merge.plugin.hook import _MergekitFinder; find = _MergekitFinder.find_spec",
            number=10_000,
        )
        print(f"each import after that: the hook adds {min(asked) / 10_000 * 1000:.5f}")


if __name__ == "__main__":
    main()
