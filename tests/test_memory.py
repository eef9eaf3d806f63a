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
from upit_merge import preflight
from upit_merge.checkpoints import OpenOptions
from upit_merge.inputs import opened
from upit_merge.merging import Merger
from upit_merge.preflight import memory_limit, needs
from upit_merge.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent

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
from upit_merge.pipeline import RunOptions, run_recipe
from upit_merge.recipe import load_recipe
tiny, recipe, out = map(Path, sys.argv[1:4])
options = RunOptions(quiet=True)
run_recipe(*load_recipe(tiny), out / "tiny", options)  # imports everything
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run_recipe(*load_recipe(recipe), out / "large", options)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
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


def test_needs_are_those_of_the_recipe(shared_family) -> None:
    """More checkpoints take more per block; more experts only where they depend on each other."""

    def merge_bytes(models: int = 1, **parameters: object) -> int:
        listed = [str(path) for path in shared_family.checkpoints] * models
        document = shared_family.recipe(models=listed, parameters=parameters)
        with opened(parse_recipe(document), OpenOptions()) as inputs:
            merger = Merger(inputs, (torch.device("cpu"),))
            return needs(merger, None, inputs.shards(1 << 30)).merge

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
    for stage, remedy, settings in (
        ("merge", "use fewer threads (--num-threads)", {}),
        ("router", "lower router.batch_tokens, max_length or memory_gb", {"router": router}),
    ):
        with pytest.raises(UpitError) as caught:
            merge(shared_family.recipe(**settings))
        message = caught.value.message
        assert message.startswith(f"The {stage} needs about 0.6 GiB of memory, but this container")
        assert f"has 0.5 GiB; {remedy}" in message
        assert not (tmp_path / "out").exists()


def test_little_free_memory_is_a_warning(shared_family, merge, monkeypatch, caplog) -> None:
    free = psutil.virtual_memory()._replace(available=100 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    merge(shared_family.recipe())
    assert "of memory are needed and 0.1 GiB are free now" in caplog.text
