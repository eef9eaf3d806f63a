"""Kills merges and fills their disk; as a program of its own, started by `crash`.

One process imports everything, then forks a child for every run: starting Python anew would take
most of the time. Prints one JSON object per trial.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tests.conftest import build_family
from tests.support.pictures import blank
from upit_merge.commands.extend import extend_output
from upit_merge.commands.options import ResizeOptions
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.commands.shrink import shrink_output
from upit_merge.config.recipe import load_recipe
from upit_merge.config.router import RouterSettings
from upit_merge.errors import UpitError
from upit_merge.output import journal as resume
from upit_merge.output.staging import EDIT_STAGING, STAGING
from upit_merge.report import figures
from upit_merge.router import progress

ROOT = Path(__file__).parents[2]

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
# Its own is shared with forks: killed while it holds it, one would make all others wait for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
OPTIONS = RunOptions(max_shard_bytes=60_000, quiet=True)


def run(recipe: Path, out: Path) -> None:
    run_recipe(*load_recipe(recipe), out, OPTIONS)


def forked(body: Callable[[], None]) -> int:
    """Start `body` in a child; its exit status is 0, or 3 for a `UpitError`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except UpitError as error:
        print(f"# {error.message}", file=sys.stderr)
        status = 3
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, Any]:
    """Files as bytes; the report without its timings, and the folder's name nowhere."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name in (STAGING, *EDIT_STAGING.values(), ".upit-lock"):
            continue
        if path.name == "upit_report.json":
            report = json.loads(path.read_text())
            del report["seconds"]
            if report["router"]:
                del report["router"]["seconds"]
            del report["model"]["name"], report["page"]["sha256"]
            found[path.name] = report
        elif path.name == "README.md":
            text = path.read_text().replace(f"# {folder.name}\n", "")
            found[path.name] = text.replace(f"your-name/{folder.name}", "")
        else:
            found[path.name] = path.read_bytes()
    return found


def wrong_models(out: Path, reference: dict[str, Any]) -> list[str]:
    """Folders at or below `out` that transformers takes for a model, but for another one."""
    found = []
    needed = {n: b for n, b in reference.items() if "safetensors" in n or n == "config.json"}
    for folder in [out, *(path for path in out.rglob("*") if path.is_dir())]:
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception:
            continue
        if any((folder / name).read_bytes() != data for name, data in needed.items()):
            found.append(str(folder.relative_to(out)))
    return found


def finish(recipe: Path, out: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """What is there after trouble, and whether the same run ends as an undisturbed one."""
    progress = resume.has_progress(out / STAGING)
    state = {"complete": out.exists() and contents(out) == reference, "progress": progress}
    state["wrong"] = wrong_models(out, reference) if out.exists() else []
    if not state["complete"]:
        state["resumed"] = wait(forked(lambda: run(recipe, out)))
        state["identical"] = contents(out) == reference
    shutil.rmtree(out)
    return state


def killed_at_any_time(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    started = time.perf_counter()
    wait(forked(lambda: run(recipe, out)))
    longest = time.perf_counter() - started
    shutil.rmtree(out)
    generator = random.Random(0)
    kills = 0
    while kills < 50:  # runs that were faster than expected do not count
        pid = forked(lambda: run(recipe, out))
        time.sleep(generator.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        kills += status == -signal.SIGKILL
        yield {"status": status, **finish(recipe, out, reference)}


def killed_at_every_rename(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    """The moments of the last step are too short to be hit by chance."""
    for count in range(1, 100):

        def run_and_die(count: int = count) -> None:
            original, left = os.replace, [count]

            def replace(*args: Any) -> None:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*args)

            os.replace = replace  # type: ignore[assignment]
            run(recipe, out)

        status = wait(forked(run_and_die))
        yield {"status": status, **finish(recipe, out, reference)}
        if status == 0:
            return


def disk_full(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    """After so many bytes neither writing nor flushing succeeds any more."""
    total = sum(len(data) for name, data in reference.items() if name.endswith(".safetensors"))
    for step in range(10):

        def run_short_of_space(budget: int = total * step // 10) -> None:
            write, flush, left = os.pwrite, os.fsync, [budget]

            def refuse_when_full(count: int = 0) -> None:
                left[0] -= count
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")

            def pwrite(fd: int, data: Any, offset: int) -> int:
                refuse_when_full(len(data))
                return write(fd, data, offset)

            def fsync(fd: int) -> None:
                refuse_when_full()
                flush(fd)

            os.pwrite, os.fsync = pwrite, fsync  # type: ignore[assignment]
            run(recipe, out)

        status = wait(forked(run_short_of_space))
        yield {"status": status, **finish(recipe, out, reference)}


def disk_really_full(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    """`out` lies on a small file system that is mounted for this; needs a user namespace."""
    disk = out.parent / "disk"
    disk.mkdir()
    total = sum(len(data) for data in reference.values() if isinstance(data, bytes))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    for step in range(10):
        # Files take whole pages; the check for space before the run is not what is tested.
        room = max(4096, total * (step + 1) // 12)
        subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)

        def run_unaware() -> None:
            shutil.disk_usage = lambda _: os.statvfs_result  # type: ignore[assignment]
            from upit_merge.commands import preflight

            preflight.missing_space = lambda *_: None  # type: ignore[assignment]
            run(recipe, disk / "out")

        status = wait(forked(run_unaware))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        yield {"status": status, **finish(recipe, disk / "out", reference)}


def edited(kind: str, recipe: Path, out: Path) -> None:
    """Change a finished model: one more expert, the base, or two experts less, in whatever way."""
    parsed, options = load_recipe(recipe)[0], ResizeOptions(quiet=True)
    settings = RouterSettings(data=parsed.router.data)  # type: ignore[union-attr]
    with contextlib.redirect_stdout(sys.stderr):
        if kind == "extend":
            extend_output(out, parsed.base_model, settings, options, all_gates=False)
        elif kind == "drop":
            shrink_output(out, 4, settings, options, how="drop", refit=True)
        else:
            shrink_output(out, 4, settings, options)


def edit_killed(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    """At every change of a file, and at any time: both edits, on one file and on several."""
    for kind, size in (("extend", 10**9), ("extend", 60_000), ("shrink", 60_000)):
        before = out.with_name(f"{kind}-{size}") / "out"
        run_recipe(*load_recipe(recipe), before, RunOptions(max_shard_bytes=size, quiet=True))
        yield from _edit_trials(kind, recipe, before, out)


def drop_killed(recipe: Path, out: Path, reference: dict[str, Any]) -> Iterator[Any]:
    """The same, where experts go and the gates are fitted anew."""
    before = out.with_name("drop") / "out"
    run_recipe(*load_recipe(recipe), before, RunOptions(max_shard_bytes=60_000, quiet=True))
    yield from _edit_trials("drop", recipe, before, out)


def _edit_trials(kind: str, recipe: Path, before: Path, out: Path) -> Iterator[Any]:
    shutil.copytree(before, out)
    started = time.perf_counter()
    wait(forked(lambda: edited(kind, recipe, out)))
    longest = time.perf_counter() - started
    old, new = contents(before), contents(out)
    shutil.rmtree(out)
    assert old != new

    def trial(pid: int) -> dict[str, Any]:
        state: dict[str, Any] = {"kind": kind, "status": wait(pid), "wrong": []}
        now = contents(out)
        if now not in (old, new):
            state["wrong"] = min(wrong_models(out, old), wrong_models(out, new), key=len)
        if now != new:
            state["finished"] = wait(forked(lambda: edited(kind, recipe, out)))
        state["identical"] = contents(out) == new
        shutil.rmtree(out)
        return state

    # Of writing and flushing there is much, and all of it aside: not every moment is tried.
    for name, step in (("replace", 1), ("unlink", 6), ("pwrite", 25), ("fsync", 12)):
        for count in range(1, 200, step):
            shutil.copytree(before, out)

            def edit_and_die(name: str = name, count: int = count) -> None:
                original, left = getattr(os, name), [count]

                def counted(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)

                setattr(os, name, counted)
                edited(kind, recipe, out)

            state = trial(forked(edit_and_die))
            yield {"at": name, **state}
            if state["status"] == 0:
                break
    generator = random.Random(0)
    for _ in range(4):
        shutil.copytree(before, out)
        pid = forked(lambda: edited(kind, recipe, out))
        time.sleep(generator.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        yield {"at": "any time", **trial(pid)}


def crash(kind: str, tmp_path: Path, *prefix: str) -> list[dict[str, Any]]:
    """Run this file's trials of a kind, in a process of their own, on a recipe with children and a router."""
    family = build_family(tmp_path / "family")
    document = family.recipe(
        parameters={"num_experts": 6},
        router={"data": str(family.seed_file(9)), "objective": "ridge"},
    )
    recipe = family.write_recipe(document)
    result = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.support.crash", kind, recipe, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    kind, recipe, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    resume.SAVE_SECONDS = progress.KEEP_SECONDS = 0.0  # as if every tensor and layer took long
    progress._KEEP_SHARE = float("inf")
    figures._save = blank
    os.fsync = lambda fd: None  # no power is cut here, and what was written outlives its process
    reference_folder = out.with_name("reference")
    run(recipe, reference_folder)  # in this process: what it imports, the children have
    reference = contents(reference_folder)
    gc.freeze()  # no child's garbage
    for trial in globals()[kind](recipe, out, reference):
        print(json.dumps(trial), flush=True)


if __name__ == "__main__":
    main()
