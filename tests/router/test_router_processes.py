"""The router's samples shared by two processes: the buckets of one, gates within rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import Family
from tests.support.commands import done, two
from tests.support.naive import load_model
from tests.support.seeds import held_out
from upit_merge.engine.hidden_states import Stream
from upit_merge.runtime.processes import Processes

# Many batches, so that both processes have some; 7 is more than one sample of most.
SMALL = ("--batch-tokens", "90")


def report(out: Path) -> dict:
    return json.loads((out / "upit_report.json").read_text())["router"]


def assert_alike(shared: Path, alone: Path) -> None:
    """Buckets to the last bit, gates to rounding, all other tensors to the last bit."""
    assert report(shared)["buckets"] == report(alone)["buckets"]
    expected = load_model(alone)
    for name, tensor in load_model(shared).items():
        if name.endswith("gate.weight"):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-3)
        else:
            assert torch.equal(tensor, expected[name]), name


def test_a_run_of_two_has_the_router_of_one(shared_family: Family, merge, tmp_path: Path) -> None:
    router = {
        "data": str(shared_family.seed_file()),
        "batch_tokens": 90,
        "objective": "softmax",
        "refine": {"steps": 3, "tokens": 200},
    }
    document = shared_family.recipe(parameters={"num_experts": 4}, router=router)
    alone = merge(document, "alone")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    result = two("run", recipe, tmp_path / "shared", module="upit_merge")
    assert result.returncode == 0, result.stderr
    assert_alike(tmp_path / "shared", alone)
    steps = [report(out)["refined"]["last_step"]["loss"] for out in (tmp_path / "shared", alone)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert not [path for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--objective", "one_vs_rest", "--stream", "expert", "--assign", "lowest"),
        ("--losses", "first_order", "--objective", "softmax"),
        ("--objective", "upit", "--upit-train-experts", "--upit-epochs", "1", "--upit-lr", "1e-3"),
    ],
    ids=["gates", "first order", "experts"],
)
def test_the_command_of_two_does_what_one_does(
    shared_family: Family, merge, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    alone = merge(shared_family.recipe(), max_shard_bytes=50_000)
    shared = shutil.copytree(alone, tmp_path / "shared")
    words = ["--data", str(shared_family.seed_file()), *SMALL, *arguments]
    result = done("router", alone, *words, "--quiet")
    result = two("router", shared, *words, module="upit_merge")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("are replaced") == 1
    assert_alike(shared, alone)
    assert sorted(path.name for path in shared.iterdir()) == sorted(
        path.name for path in alone.iterdir()
    )


def test_two_measure_what_one_does(shared_family: Family, merge, tmp_path: Path) -> None:
    out = merge(shared_family.recipe())
    words = ["evaluate", str(out), "--data", str(held_out(tmp_path)), *SMALL, "--group-by", "kind"]
    found = []
    for name in ("one", "two"):
        words_with_json = [*words, "--json", str(tmp_path / f"{name}.json")]
        if name == "one":
            done(*words_with_json, "--quiet")
        else:
            result = two(*words_with_json, module="upit_merge")
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("Held-out perplexity") == 1
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[0] == found[1]


def test_every_batch_has_one_process() -> None:
    stream = Stream(0, ((1, 2), (3,), (4, 5), (6,), (7, 8, 9)))
    for size in (1, 2, 3, 8):
        shares = [stream.share(Processes(rank, size)) for rank in range(size)]
        together = [batch for share in shares for batch in share.batches]
        assert sorted(together) == sorted(stream.batches)
