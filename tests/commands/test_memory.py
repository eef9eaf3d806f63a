"""The memory of a merge: enforced by the operating system on a model that is larger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import build_family
from tests.support.commands import refused
from upit_merge.commands import preflight
from upit_merge.commands.preflight import memory_limit, needs, router_needs
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.router import RouterSettings
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened
from upit_merge.router.memory import ModelShape, router_memory

ROOT = Path(__file__).resolve().parents[2]

# Largest tensor, models and output of the limited run, in MiB: 2, 300, 750. Holding the models,
# or the output, or a memory map of either for long, would break the limit.
SIZE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
LARGEST = 512 * 2048 * 2
SPARE = 192 << 20

_LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import load_recipe
tiny, recipe, out = map(Path, sys.argv[1:4])
options = RunOptions(quiet=True)
run_recipe(*load_recipe(tiny), out / "tiny", options)  # imports everything
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run_recipe(*load_recipe(recipe), out / "large", options)
# Not `ru_maxrss`, which begins with the memory of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(int(status["VmHWM"].split()[0]) * 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_merge_stays_within_a_hard_limit(tmp_path: Path, mutation: str) -> None:
    tiny = build_family(tmp_path / "tiny")
    large = build_family(tmp_path / "large", dtype=torch.bfloat16, noise=0, **SIZE)
    parameters = {"num_experts": 10, "mutation": mutation}
    recipes = [f.write_recipe(f.recipe(parameters=parameters)) for f in (tiny, large)]
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, *recipes, tmp_path / "out", str(6 * LARGEST + SPARE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    output = tmp_path / "out" / "large" / "model.safetensors"
    assert output.stat().st_size > 3 * (6 * LARGEST + SPARE)
    assert json.loads(result.stdout) < (1 << 30) + 6 * LARGEST


_EXTRACT_LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from upit_merge.commands.extract import ExtractOptions, extract_expert
tiny, large, out = map(Path, sys.argv[1:4])
options = ExtractOptions(quiet=True)
extract_expert(tiny, out / "tiny", [], options, average=True)  # imports everything
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
extract_expert(large, out / "large", [], options, average=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_extract_reads_piece_by_piece(tmp_path: Path, merge) -> None:
    """A dense model that is larger than the memory it may take, from four times as much."""
    folders = []
    for name, size in (("tiny", {}), ("large", {**SIZE, "vocab_size": 40_000})):
        family = build_family(tmp_path / name, count=1, dtype=torch.bfloat16, **size)
        parameters = {"num_experts": 4, "expansion": "copy"}
        recipe = family.recipe(parameters=parameters)
        folders.append(merge(recipe, f"{name}-moe", max_shard_bytes=50 << 20))
    spare = 80 << 20
    words = [*folders, tmp_path / "out", str(spare)]
    result = subprocess.run(
        [sys.executable, "-c", _EXTRACT_LIMITED, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "large" / "model.safetensors").stat().st_size > 2 * spare


def test_needs_are_those_of_the_recipe(shared_family) -> None:
    """More checkpoints take more per block; more experts only where they depend on each other."""

    def merge_bytes(models: int = 1, **parameters: object) -> int:
        listed = [str(path) for path in shared_family.checkpoints] * models
        document = shared_family.recipe(models=listed, parameters=parameters)
        with opened(parse_recipe(document), OpenOptions()) as inputs:
            devices = (torch.device("cpu"),)
            return needs(inputs, devices, None, inputs.shards(1 << 30)).merge

    assert merge_bytes(models=4) > merge_bytes()
    assert merge_bytes(num_experts=64) == merge_bytes(num_experts=4)
    assert merge_bytes(num_experts=64) < 1 << 30
    assert merge_bytes(models=20, num_experts=64, mutation="compound") < 1 << 30


@pytest.mark.parametrize(
    ("text", "limit"),
    [("123456789\n", 123456789), ("max\n", None), ("9223372036854771712\n", None), ("", None)],
)
def test_memory_limit_is_the_container_s(tmp_path: Path, monkeypatch, text, limit) -> None:
    path = tmp_path / "memory.max"
    path.write_text(text)
    monkeypatch.setattr(preflight, "_CGROUPS", (str(tmp_path / "missing"), str(path)))
    total = psutil.virtual_memory().total
    assert memory_limit() == ((limit, "this container") if limit else (total, "this machine"))


def test_too_little_memory_is_told_before_the_work(shared_family, tmp_path, merge, monkeypatch):
    from upit_merge.errors import UpitError

    monkeypatch.setattr(preflight, "memory_limit", lambda: (500 << 20, "this container"))
    router = {"data": str(shared_family.seed_file()), "memory_gb": 0.001}
    for stage, gib, remedy, settings in (
        ("merge", 0.6, "use fewer threads (--num-threads)", {}),
        ("router", 0.7, "lower router.batch_tokens, max_length or memory_gb", {"router": router}),
    ):
        with pytest.raises(UpitError) as caught:
            merge(shared_family.recipe(**settings))
        message = caught.value.message
        assert message.startswith(
            f"The {stage} needs about {gib} GiB of memory, but this container"
        )
        assert f"has 0.5 GiB; {remedy}" in message
        assert not (tmp_path / "out").exists()


def test_little_free_memory_is_a_warning(shared_family, merge, monkeypatch, caplog) -> None:
    free = psutil.virtual_memory()._replace(available=100 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    merge(shared_family.recipe())
    assert "of memory are needed and 0.1 GiB are free now" in caplog.text


def test_a_7b_mixture_fits_a_notebook_s_gpu_and_a_desktop() -> None:
    """8 x 7B in bfloat16: 16 GB on the device, or 24 GB of RAM without one."""
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 4096
    shape = ModelShape(4096, 14336, 32_000, 32, 8, attention, itemsize=2)
    lengths = [512] * 1000
    for settings in ({}, {"refine": {"steps": 10}}):
        chosen = RouterSettings(data="-", **settings)
        on_gpu = router_needs(
            router_memory(shape, lengths, chosen, cpu=False), torch.device("cuda")
        )
        assert on_gpu.device < 16e9
        assert on_gpu.memory < 24e9
    plain = RouterSettings(data="-")
    on_cpu = router_needs(router_memory(shape, lengths, plain, cpu=True), torch.device("cpu"))
    assert on_cpu.memory < 12e9
    assert on_cpu.device is None
    deep = ModelShape(4096, 14336, 32_000, 80, 8, attention, itemsize=2)
    deeper, usual = (router_memory(s, lengths, plain, cpu=True) for s in (deep, shape))
    assert (deeper.compute, deeper.states) == (usual.compute, usual.states)
    # What enters each layer is on the disk.
    assert deeper.spilled > usual.spilled


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_router_takes_what_was_foretold(tmp_path: Path) -> None:
    """Measured in a process of its own; see benchmarks/router_memory.py for larger ones."""
    command = [sys.executable, "benchmarks/router_memory.py", "--folder", str(tmp_path)]
    command += ["--json", str(tmp_path / "found.json"), "small, short", "small, refine"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for row in json.loads((tmp_path / "found.json").read_text()):
        assert 0.4 < row["peak"] / row["foretold"] < 1.0, row


def test_commands_ask_for_memory_before_the_work(shared_family, merge, monkeypatch) -> None:

    out = merge(shared_family.recipe())
    monkeypatch.setattr(preflight, "memory_limit", lambda: (500 << 20, "this container"))
    for command in ("router", "evaluate"):
        words = [command, str(out), "--data", str(shared_family.seed_file())]
        assert "The router needs about 0.7 GiB of memory" in refused(*words)
        assert not [path for path in out.iterdir() if path.name.startswith(".upit")]
