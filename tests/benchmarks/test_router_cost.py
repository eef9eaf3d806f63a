"""benchmarks.router_cost: the stage in a process of its own, and what its tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import router_cost
from benchmarks.router_cost import Bench, Run, given_up
from benchmarks.router_cost_tables import costs, memory, quality
from benchmarks.router_models import with_random_gates
from tests.conftest import Family, byte_tokenizer
from tests.support.commands import done

ROOT = Path(__file__).parents[2]


def test_the_stage_alone_leaves_losses_and_gates(family: Family, tmp_path: Path) -> None:
    """Losses as of dense models, gates as the command leaves them, and a process's own seconds."""
    data = family.seed_file(6)
    moe, gates = tmp_path / "moe", tmp_path / "gates.safetensors"
    with_random_gates(family.root, 3, 0, moe)
    job = {"root": str(ROOT), "moe": str(moe), "settings": {"data": str(data)}, "out": str(gates)}
    command = [sys.executable, str(ROOT / "benchmarks" / "router_stage.py"), json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(output.stdout.splitlines()[-1])
    found = load_file(gates)

    assert 0 < result["cpu"] < result["before"] + result["cpu"]
    assert result["samples"] == 6
    assert result["peak"] > 100  # MiB; nothing that imports torch takes less
    backbone = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1])
    for index, line in enumerate(data.read_text().splitlines()):
        ids = torch.tensor([byte_tokenizer()(json.loads(line)["text"])["input_ids"]])
        losses = []
        for path in family.checkpoints:
            expert = AutoModelForCausalLM.from_pretrained(path).state_dict()
            ffn = {name: weight for name, weight in expert.items() if ".mlp." in name}
            backbone.load_state_dict(ffn, strict=False)
            with torch.no_grad():
                losses.append(backbone(ids, labels=ids).loss.item())
        # By whatever rule: the expert that was chosen is one that is not worse than the mean.
        assert losses[found["assigned"][index]] <= sum(losses) / len(losses) + 1e-4

    # The stage alone takes the dtype of its settings, where `auto` means float32.
    done("router", str(moe), "--data", str(data), "--compute", "float32", "--quiet")
    stored = {}
    for path in moe.glob("*.safetensors"):
        stored |= {name: w for name, w in load_file(path).items() if name.endswith("gate.weight")}
    for layer, name in enumerate(sorted(stored)):
        torch.testing.assert_close(found[f"gate.{layer}"], stored[name])


def test_a_tree_that_is_not_the_one_named_is_refused(tmp_path: Path) -> None:
    job = {"root": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "router_stage.py"), json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"not from {tmp_path}" in refused.stderr


def test_given_up() -> None:
    """By hand: the best experts have 1 and 2, the best single one has 2.5 in the mean."""
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 3.0, 2.0]])
    found = given_up(losses, torch.tensor([1, 2]))
    assert found["gain"] == pytest.approx(2.5 - 1.5)
    assert found["given_up"] == pytest.approx(0.5)
    assert found["agreement"] == 0.5
    assert given_up(losses, losses.argmin(1))["given_up"] == 0


def test_a_run_s_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """Exact losses first, then another rule judged by them; what is there is not run again."""
    moe = with_random_gates(family.root, 3, 0, tmp_path / "moe")
    data = family.seed_file(6)
    monkeypatch.setattr(Bench, "models", lambda _self, _run: (moe, data, 64))
    path = tmp_path / "results.json"
    bench = Bench(tmp_path, None, sys.executable, path)
    exact, auto = (Run("tiny/specialised-0", 3, 6, what) for what in ("exact", "auto"))
    bench.do(Run("tiny/specialised-0", 3, 6, router_cost.OLD))  # no worktree of it: left out
    bench.do(exact)
    bench.do(auto)
    stored = json.loads(path.read_text())
    assert list(stored) == [exact.key, auto.key]
    assert stored[exact.key]["given_up"] == 0
    assert stored[auto.key]["given_up"] >= 0

    again = Bench(tmp_path, None, sys.executable, path)
    monkeypatch.setattr(router_cost.subprocess, "run", None)
    again.do(exact)
    assert again.results == stored


def result(what: str, **values: object) -> dict[str, object]:
    run = {"model": "tiny/specialised-0", "experts": 8, "samples": 600, "what": what}
    return {**run, "tokens": 72202, "peak": 500.0, **values}


def test_tables() -> None:
    """The median of equal runs; a row only of what was compared."""
    old = [result("0.5.0", cpu=seconds) for seconds in (60.0, 61.0, 90.0)]
    exact = result("exact", cpu=30.5, perplexity=12.0, gain=0.1, given_up=0.0, agreement=1.0)
    estimate = {"perplexity": 12.03, "gain": 0.1, "given_up": 0.004, "agreement": 0.75}
    auto = result("auto", cpu=12.2, foretold=1000.0, **{**estimate, "peak": 600.0})
    row = costs([*old, exact, auto])[-1]
    assert "| tiny, specialised, seed 0 | 8 | 600 (72,202) | 61.0 | 30.5 |  | 12.2 |" in row
    assert "| 2.0 x | 5.0 x |" in row
    assert memory([*old, exact, auto])[-1].endswith("| 1.20 | 1,000 | 0.60 |")
    assert (
        "| 12.000 | 12.030 (+0.25 %) | 12.030 (+0.25 %) | 0.1000 | 4.0 % | 4.0 % | 75 % |"
        in (quality([*old, exact, auto])[-1])
    )
    assert len(costs([exact, auto])) == 2
    assert len(quality(old)) == 2
