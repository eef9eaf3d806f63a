"""What the router stage costs, and what estimated losses give up, beside 0.5.0 and mergekit-moe.

python -m benchmarks.router_cost --folder F --old WORKTREE --json FILE [--only stage curve quality]
python -m benchmarks.router_cost --tables FILE

WORKTREE is 0.5.0's source (`git worktree add WORKTREE <commit of 0.5.0>`), whose stage runs on the
same folders and samples. Every run is a process of its own with one thread, the versions in turn;
seconds are those of the CPU. F receives the models: tiny ones (benchmarks/router_models.py, three
seeds of each kind, and branches far apart) and SmolLM2-135M's (benchmarks/router_real.py). Models
and runs that F and FILE hold already are not made again. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from benchmarks import router_real
from benchmarks.perplexity import mixture_perplexity
from benchmarks.router_cost_tables import print_tables
from benchmarks.router_fits import mergekit_prompts
from benchmarks.router_models import build, build_apart, with_random_gates
from benchmarks.router_stage import cpu_seconds, peak_memory
from upit_merge.config.router import RouterSettings
from upit_merge.demo.corpus import load_domains, write_texts
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.buckets import Buckets, shuffled
from upit_merge.router.pretrain import seed_set_for

ROOT = Path(__file__).resolve().parent.parent
OLD = "0.5.0"
RULES = ("exact", "first_order", "auto")
MERGEKIT = "mergekit-moe"
SEEDS = (0, 1, 2)
EXPERTS = (4, 8, 16, 32, 64)
SAMPLES = (100, 200, 500, 1000, 2000)


@dataclass(frozen=True)
class Run:
    """One stage in a process of its own.

    Attributes:
        model: A folder below the benchmark's, with `sft/`, `moe-N/` and samples.
        experts: N.
        samples: How many; a file with so many more is used where `seed.jsonl` has fewer.
        what: 0.5.0, a rule of `router.losses`, or mergekit-moe.
        repeat: Which of several equal runs.
    """

    model: str
    experts: int
    samples: int
    what: str
    repeat: int = 0

    @property
    def key(self) -> str:
        return f"{self.model} {self.experts} {self.samples} {self.what} {self.repeat}"


def stage_runs(repeats: int = 1) -> Iterator[Run]:
    """The whole stage of all versions, 8 and 64 experts, on a tiny model and on a real one."""
    for repeat in range(repeats):
        for model, experts, samples in (
            ("tiny/specialised-0", 8, 600),
            ("tiny/specialised-0", 64, 600),
            ("real/specialised", 8, 192),
            ("real/specialised", 64, 64),
        ):
            for what in (OLD, *RULES, MERGEKIT):
                yield Run(model, experts, samples, what, repeat)


def curve_runs() -> Iterator[Run]:
    """The cost over the number of experts, and over that of samples."""
    sizes = [(experts, 600) for experts in EXPERTS] + [(8, samples) for samples in SAMPLES]
    for experts, samples in sizes:
        for what in (OLD, "auto", MERGEKIT):
            yield Run("tiny/specialised-0", experts, samples, what)


def quality_runs() -> Iterator[Run]:
    """Exact and estimated losses on every model."""
    tiny = [f"tiny/{kind}-{seed}" for kind in ("specialised", "mixed") for seed in SEEDS]
    for model in (*tiny, "tiny/apart-0"):
        for rule in RULES:
            yield Run(model, 8, 600, rule)
    for model in ("real/specialised", "real/mixed"):
        for rule in RULES:
            yield Run(model, 8, 192, rule)


PARTS = {"stage": stage_runs, "curve": curve_runs, "quality": quality_runs}


class Bench:
    """Makes models, runs what was not run yet, and keeps the results.

    Args:
        folder: For the models.
        old: The worktree of 0.5.0; None to leave its runs out.
        old_python: Has what 0.5.0 needs.
        path: The JSON file with the results.
    """

    def __init__(self, folder: Path, old: Path | None, old_python: str, path: Path) -> None:
        self.folder, self.old, self.old_python, self.path = folder, old, old_python, path
        self.results: dict[str, Any] = {}
        if path.is_file():
            self.results = json.loads(path.read_text(encoding="utf-8"))

    def models(self, run: Run) -> tuple[Path, Path, int]:
        """Make what a run needs; returns the mixture, the samples, and their longest in tokens."""
        kind, name = run.model.split("/")
        folder = self.folder / run.model
        if kind == "real":
            router_real.build(self.folder / kind, name, [run.experts])
            return folder / f"moe-{run.experts}", folder / "seed.jsonl", router_real.CONTEXT
        variant, seed = name.split("-")
        if variant == "apart":
            build_apart(folder, int(seed))
        else:
            build(folder, int(seed), mixed=variant == "mixed")
        moe = folder / ("moe" if run.experts == 8 else f"moe-{run.experts}")
        if not (moe / "config.json").is_file():
            with_random_gates(folder, run.experts, int(seed), moe)
        data = folder / "seed.jsonl"
        if run.samples > 600:
            data = folder / f"seed-{run.samples}.jsonl"
            generator, domains = random.Random(int(seed)), load_domains()
            count = -(-run.samples // len(domains))
            write_texts(data, domains, [generator.sample(d.train, count) for d in domains])
        return moe, data, 512

    def gates_file(self, run: Run) -> Path:
        """Where a run leaves the gates, its choice of experts, and the losses it chose by."""
        return self.folder / "runs" / f"{run.key.replace('/', ' ')}.safetensors"

    def do(self, run: Run) -> None:
        """Do a run, unless its result is there."""
        if run.key in self.results or (run.what == OLD and self.old is None):
            return
        moe, data, longest = self.models(run)
        gates = self.gates_file(run)
        gates.parent.mkdir(exist_ok=True)
        settings: dict[str, Any] = {"data": str(data), "sample": run.samples, "max_length": longest}
        root, python = (self.old, self.old_python) if run.what == OLD else (ROOT, sys.executable)
        if run.what in RULES:
            settings["losses"] = run.what
        job = {"root": str(root), "moe": str(moe), "settings": settings, "out": str(gates)}
        command = [python, str(ROOT / "benchmarks" / "router_stage.py"), json.dumps(job)]
        if run.what == MERGEKIT:
            job["folder"] = str(self.folder / run.model)
            command = [python, "-m", "benchmarks.router_cost", "--mergekit", json.dumps(job)]
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        output = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        result: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
        if run.what != MERGEKIT:
            result |= self.judged(run, moe, gates, longest)
        self.results[run.key] = {**asdict(run), **result}
        self.path.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        print(f"{run.key}: {json.dumps(result)}", flush=True)

    def judged(self, run: Run, moe: Path, gates: Path, longest: int) -> dict[str, Any]:
        """How good the gates are, and what the choice of experts gives up by exact losses."""
        found = load_file(gates)
        layers = [found[f"gate.{i}"] for i in range(sum(n.startswith("gate.") for n in found))]
        judged: dict[str, Any] = {}
        if run.repeat == 0 and run.samples in (600, 192):
            held_out = self.folder / run.model / "held-out.jsonl"
            judged["perplexity"] = mixture_perplexity(moe, layers, held_out, longest)
        exact = replace(run, what="exact", repeat=0)
        if run.what in RULES and (exact.key in self.results or exact == run):
            judged |= given_up(load_file(self.gates_file(exact))["losses"], found["assigned"])
        return judged


def given_up(losses: torch.Tensor, assigned: torch.Tensor) -> dict[str, float]:
    """What a choice of experts loses against the best one, by exact losses in nats per token.

    Args:
        losses: Exact, (num_samples, num_experts).
        assigned: The expert chosen for each sample.

    Returns:
        `gain`: of the best expert for each sample over the best single one; `given_up`: of that
        gain, in nats too; `agreement`: the share of samples whose best expert was chosen.
    """
    best = losses.min(dim=1).values.mean()
    chosen = losses.gather(1, assigned.unsqueeze(1)).mean()
    return {
        "gain": float(losses.mean(dim=0).min() - best),
        "given_up": float(chosen - best),
        "agreement": float((losses.argmin(dim=1) == assigned).double().mean()),
    }


def time_mergekit(job: dict[str, Any]) -> dict[str, Any]:
    """mergekit-moe's `gate_mode: hidden` on the same samples, an equal part for every expert.

    Which samples an expert has is the user's to say there, and nothing is computed for it.
    """
    moe = Path(job["moe"])
    with opened_mixture(moe) as mixture:
        model = LayerwiseMixture(mixture, torch.device("cpu"))
        seeds = seed_set_for(model, moe, RouterSettings(**job["settings"]), 0)
        buckets = Buckets(shuffled(len(seeds.samples), model.num_experts, 0), model.num_experts)
    prepared = mergekit_prompts(Path(job["folder"]), moe, seeds, buckets)
    before, started = cpu_seconds(), time.perf_counter()
    prepared("hidden")
    cpu, wall = cpu_seconds() - before, time.perf_counter() - started
    return {"cpu": cpu, "wall": wall, "peak": peak_memory(), "samples": len(seeds.samples)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the models; up to 15 GB")
    parser.add_argument("--old", type=Path, help="0.5.0's source; without it its runs are left out")
    parser.add_argument("--old-python", default=sys.executable, help="if 0.5.0 needs another one")
    parser.add_argument(
        "--json", type=Path, help="the results; runs that it holds are not repeated"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeat", type=int, default=1, help="runs of each stage")
    parser.add_argument("--match", default="", help="only runs whose name has this")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="of earlier runs")
    parser.add_argument("--mergekit", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.mergekit:
        print(json.dumps(time_mergekit(json.loads(arguments.mergekit))))
        return
    if arguments.tables:
        print_tables(json.loads(arguments.tables.read_text(encoding="utf-8")))
        return
    bench = Bench(arguments.folder, arguments.old, arguments.old_python, arguments.json)
    for part in arguments.only:
        for run in stage_runs(arguments.repeat) if part == "stage" else PARTS[part]():
            if arguments.match in run.key:
                bench.do(run)
    print_tables(bench.results)


if __name__ == "__main__":
    main()
