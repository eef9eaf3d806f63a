"""The whole router stage of one version, in a process of its own; started by router_cost.py.

PYTHONPATH=ROOT python benchmarks/router_stage.py JOB

ROOT is a source tree of upit-merge, this one or 0.5.0's, whose modules lie elsewhere. JOB is JSON:
`root`, `moe` (a mixture's folder), `settings` (of the recipe's `router:`) and `out`, a safetensors
file for the gates and, per sample, the expert it was given and its losses. Prints seconds, memory
and digests as JSON.

CPU seconds are those of the process, user and system, of all its threads; what starts before the
mixture is opened (imports, mostly) is told apart and not part of the stage's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# What the stage would import on the way, which is not its work.
ON_THE_WAY = (
    "scipy.optimize",
    "scipy.sparse",
    "transformers.masking_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.mixtral.modeling_mixtral",
)


def modules_of(version: str) -> Any:
    """What the stage is made of, by the names it has here."""
    if version == "0.5.0":
        places = {
            "opened": "router.gate_files.opened_moe",
            "Model": "router.layerwise.LayerwiseMoe",
            "Settings": "router.settings.RouterSettings",
        }
    else:
        places = {
            "opened": "models.mixture.opened_mixture",
            "Model": "engine.layerwise.LayerwiseMixture",
            "Settings": "config.router.RouterSettings",
        }
    places |= {
        "Stage": "router.stage.RouterStage",
        "Progress": "router.progress.Progress",
        "pretrain": "router.pretrain.pretrain_router",
        "seed_set": "router.pretrain.seed_set_for",
    }
    found = {}
    for name, place in places.items():
        module, _, attribute = place.rpartition(".")
        found[name] = getattr(importlib.import_module(f"upit_merge.{module}"), attribute)
    # Where the buckets are made, to look at them.
    ours = importlib.import_module("upit_merge.router.pretrain")
    found["buckets"] = (found["Stage"], "buckets") if version == "0.5.0" else (ours, "assigned")
    return found


def cpu_seconds() -> float:
    """Of this process, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_memory() -> float:
    """Of this process, MiB; getrusage's would begin with the memory of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def foretold(model: Any, lengths: list[int], settings: Any) -> float | None:
    """What this version's own preflight would ask for, MiB; None of 0.5.0, which is not judged."""
    try:
        from upit_merge.commands.preflight import router_needs
        from upit_merge.router.memory import router_memory, shape_of
    except ImportError:
        return None
    dense = model.architecture.dense_settings()
    shape = shape_of(model.format, dense, model.num_experts, model.stored_dtype)
    needs = router_needs(router_memory(shape, lengths, settings, cpu=True), model.device)
    return needs.memory / 2**20


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors' bytes, by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def run(job: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """The stage, from the folder to the gates; the gates are not put into the folder."""
    started_cpu, started = cpu_seconds(), time.perf_counter()
    # The stage's report only sums up the buckets.
    recorded: list[Any] = []
    owner, name = parts["buckets"]
    make = getattr(owner, name)

    def buckets(stage: Any) -> Any:
        recorded.append(make(stage))
        return recorded[-1]

    setattr(owner, name, buckets)
    folder, settings = Path(job["moe"]), parts["Settings"](**job["settings"])
    with parts["opened"](folder, "the mixture") as moe, tempfile.TemporaryDirectory() as scratch:
        model = parts["Model"](moe, torch.device("cpu"))
        seeds = parts["seed_set"](model, folder, settings, 0)
        stage = parts["Stage"](model, seeds, settings, 0, Path(scratch), quiet=True)
        result = parts["pretrain"](stage)
        cpu, wall = cpu_seconds() - started_cpu, time.perf_counter() - started
        gates = {str(i): gate.contiguous() for i, gate in enumerate(result.gates)}
        (found,) = recorded
        kept = {"assigned": found.assigned}
        if found.losses is not None:
            kept["losses"] = found.losses.means
        save_file({**{f"gate.{name}": gate for name, gate in gates.items()}, **kept}, job["out"])
        return {
            "cpu": cpu,
            "wall": wall,
            "before": started_cpu,
            "seconds": result.report["seconds"],
            "peak": peak_memory(),
            "foretold": foretold(model, stage.lengths, settings),
            "samples": len(seeds.samples),
            "tokens": sum(stage.lengths),
            "samples_sha256": seeds.digest(),
            "sizes": found.sizes,
            "gates_sha256": digest(gates),
            "buckets": {k: v for k, v in result.report["buckets"].items() if k != "experts"},
            "threads": torch.get_num_threads(),
        }


def main() -> None:
    job = json.loads(sys.argv[1])
    import upit_merge

    place = Path(upit_merge.__file__).resolve().parents[1]
    if place != Path(job["root"]).resolve():
        raise SystemExit(f"upit_merge comes from {place}, not from {job['root']}")
    parts = modules_of("0.5.0" if (place / "upit_merge" / "merging.py").is_file() else "")
    for name in ON_THE_WAY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    print(json.dumps({"version": upit_merge.__version__, **run(job, parts)}))


if __name__ == "__main__":
    main()
