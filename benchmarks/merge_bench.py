"""How `merge.py` runs its jobs: a process each, their memory sampled, the time left told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from merge_jobs import (
    CROSSINGS,
    EXPERTS,
    ITEM,
    PLAN_REPEATS,
    PLANNED,
    Shape,
    proc,
)
from merge_plot import OLDER

JOBS = Path(__file__).with_name("merge_jobs.py")
SAMPLING_SECONDS = 0.02
SPARE_BYTES = 1 << 30  # of the disk, never used
TRIED_FIRST = ("upit-merge", "mergekit", "planning")


class Progress:
    """What is still to be done, in bytes to move, and how long that should take."""

    def __init__(self) -> None:
        self.left: dict[str, tuple[str, int]] = {}
        self.done: dict[str, tuple[int, float]] = {}

    def expect(self, label: str, kind: str, weight: int) -> None:
        self.left[label] = (kind, weight)

    def skip(self, label: str) -> None:
        self.left.pop(label, None)

    def finish(self, label: str, seconds: float, measured: float) -> None:
        """`seconds` are those of the whole process, with what is not measured."""
        kind, weight = self.left.pop(label)
        moved, spent = self.done.get(kind, (0, 0.0))
        self.done[kind] = (moved + weight, spent + seconds)
        usual = sum(s for _, s in self.done.values()) / sum(w for w, _ in self.done.values())
        left = 0.0
        for other, bytes_left in self.left.values():
            moved, spent = self.done.get(other, (0, 0.0))
            left += bytes_left * (spent / moved if moved else usual)
        click.echo(f"{label}: {measured:.1f} s, about {left / 60:.1f} min left")


def bytes_to_move(kind: str, shape: Shape, checkpoints: int, experts: int) -> int:
    """Roughly what a job reads and writes; weighs the jobs against each other."""
    model = ITEM * shape.parameters
    inputs, out = (checkpoints + 1) * model, shape.moe_bytes(experts)
    return {
        "make": inputs,
        "upit-merge": 2 * inputs + out,
        OLDER: 2 * inputs + out,
        "copy": inputs + out,
        "mergekit": mergekit_reads(shape) + len(CROSSINGS) * model + out,
        "planning": len(PLANNED) * PLAN_REPEATS * inputs,
    }[kind]


def mergekit_reads(shape: Shape) -> int:
    """Three models per child; then what the MoE consists of."""
    model, gates = ITEM * shape.parameters, ITEM * shape.layers * EXPERTS * shape.hidden
    return len(CROSSINGS) * 3 * model + shape.moe_bytes(EXPERTS) - gates


class Bench:
    """Runs jobs in a work folder, one process each."""

    def __init__(self, folder: Path, threads: int | None, older: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.out = self.folder / "out"
        self.progress = Progress()
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.older = {**self.environment, "PYTHONPATH": str(older.absolute())} if older else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_outputs()

    def remove_outputs(self) -> None:
        for folder in self.folder.glob(f"{self.out.name}*"):
            shutil.rmtree(folder)

    def run(self, label: str, name: str, **job: Any) -> dict[str, Any]:
        """Run an expected job; its output is removed afterwards."""
        environment = self.environment
        if name == OLDER and self.older:
            name, environment = "upit-merge", self.older
        job = {"name": name, "out": str(self.out), **job}
        if name in TRIED_FIRST:
            job["toy"] = str(self.folder / "toy")
        started, anonymous = time.perf_counter(), 0
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            command = [sys.executable, str(JOBS), json.dumps(job, default=str)]
            child = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
            try:
                while child.poll() is None:
                    anonymous = max(anonymous, anonymous_memory(child.pid))
                    time.sleep(SAMPLING_SECONDS)
            finally:
                child.kill()
                child.wait()
                self.remove_outputs()
            output.seek(0)
            errors.seek(0)
            if child.returncode:
                told = errors.read().decode(errors="replace").strip()
                raise click.ClickException(f"{label} failed ({child.returncode}): {told[-2000:]}")
            result: dict[str, Any] = json.loads(output.read().decode().splitlines()[-1])
        self.progress.finish(label, time.perf_counter() - started, result["wall"])
        return result | {"peak_anonymous": anonymous}

    def has_models(self, family: Path, shape: Shape, checkpoints: int) -> bool:
        try:
            made = json.loads((family / "settings.json").read_text())
        except FileNotFoundError:
            return False
        return made["shape"] == asdict(shape) and made["checkpoints"] >= checkpoints

    def lacking(self, family: Path, shape: Shape, checkpoints: int, output: int) -> int:
        """Bytes that the disk has too few for the models and an output."""
        needed = output + SPARE_BYTES
        if not self.has_models(family, shape, checkpoints):
            shutil.rmtree(family, ignore_errors=True)
            needed += (checkpoints + 1) * ITEM * shape.parameters
        return max(0, needed - shutil.disk_usage(self.folder).free)

    def make_models(self, label: str, family: Path, shape: Shape, checkpoints: int) -> None:
        """Unless they are there; more checkpoints than asked for do no harm."""
        if self.has_models(family, shape, checkpoints):
            self.progress.skip(label)
            return
        shutil.rmtree(family, ignore_errors=True)
        weight = bytes_to_move("make", shape, checkpoints, 0)
        self.progress.expect(label, "make", weight)
        made = {"shape": asdict(shape), "checkpoints": checkpoints}
        self.run(label, "make", family=family, **made)
        (family / "settings.json").write_text(json.dumps(made))


def anonymous_memory(process: int) -> int:
    try:
        return proc(f"{process}/status").get("RssAnon", 0) << 10
    except OSError:  # it has just ended
        return 0
