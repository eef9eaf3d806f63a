"""One merge shared by threads, devices and processes: always the same bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import Family, build_family
from tests.support.commands import torchrun, two
from tests.support.crash import contents
from tests.support.naive import load_model
from upit_merge.config.recipe import parse_recipe
from upit_merge.io.hub import OpenOptions
from upit_merge.io.shards import Shard, ShardWriter
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.merge.inputs import opened
from upit_merge.merge.passes import merge, share_of
from upit_merge.output.journal import Journal
from upit_merge.output.staging import Staging
from upit_merge.runtime.clock import Clock
from upit_merge.runtime.device import merge_workers
from upit_merge.runtime.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 60_000


@pytest.mark.parametrize(
    ("module", "num_experts"),
    [("upit_merge", 6), ("mergekit.scripts.run_yaml", None)],
    ids=["two passes", "one pass"],
)
def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, merge, module: str, num_experts: int | None
) -> None:
    family = build_family(tmp_path / "family")
    document = family.recipe(
        parameters={"num_experts": num_experts} if num_experts else {},
        # One batch: of several, sums are added up in another order.
        router={"data": str(family.seed_file()), "objective": "ridge", "sample": 1},
    )
    alone = merge(document, max_shard_bytes=SHARD_BYTES)
    shared = tmp_path / "shared"
    words = ["run"] if module == "upit_merge" else []
    recipe = family.root / "recipe.yml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    result = two(*words, recipe, shared, "--out-shard-size", SHARD_BYTES, module=module)
    assert result.returncode == 0, result.stderr
    assert contents(shared) == contents(alone)
    assert len(list(shared.glob("*.safetensors"))) > 4
    assert result.stdout.count("The model is in") == 1  # one of them speaks
    assert not [path.name for path in shared.iterdir() if path.name.startswith(".")]


def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path) -> None:
    family = build_family(tmp_path / "family")
    recipe = family.write_recipe(family.recipe(parameters={"backbone": "nowhere"}))
    result = torchrun("run", recipe, tmp_path / "out", module="upit_merge")
    assert result.returncode != 0
    assert len(re.findall("^Error: .*backbone: nowhere", result.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "out").exists()


def test_every_shard_has_one_writer() -> None:
    for sizes in ([5], [5, 1], [9, 1, 1, 1, 1, 1], [3] * 17):
        shards = [
            Shard(f"{i}", (TensorSpec(f"t{i}", (size,), torch.float32),))
            for i, size in enumerate(sizes)
        ]
        for size in (1, 2, 3, 8):
            shares = [share_of(shards, Processes(rank, size)) for rank in range(size)]
            assert [shard for share in shares for shard in share] == shards
            if len(shards) >= 16 and size <= 8:
                assert all(shares)


# ---- inside one process --------------------------------------------------------------------


def weights_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all tensors but the gates, whatever files they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_model(folder).items()):
        if name.endswith("gate.weight"):  # random numbers, or fitted by matrix products
            continue
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reference_family(root: Path) -> Family:
    """Models whose values are sums of integers' cosines: the same on every machine and torch."""
    family = build_family(root, count=3, dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file

    for number, folder in enumerate([family.base, *family.checkpoints]):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for index, (name, tensor) in enumerate(sorted(tensors.items())):
            element = torch.arange(tensor.numel(), dtype=torch.int64)
            # A small multiplicative generator in integers; exact everywhere.
            noise = (element * 48271 + 1009 * index + 7919 * number) % 65537
            value = (noise.to(torch.float64) - 32768) / 2**21 * number + (element % 97) / 2**9
            tensors[name] = value.to(torch.bfloat16).view(tensor.shape)
        save_file(tensors, path, {"format": "pt"})
    return family


RECORDED = {
    "once": "420e48c922e0a05c8a19710ddf1e8de050388c384249bb15c0cf71bd0c40d136",
    "compound": "0e9f0c91e5f3d9832b39b082eb4ed9a702faac2715e17e65a31528a928fd36c1",
}


@pytest.mark.parametrize("mutation", RECORDED)
def test_bytes_are_those_recorded(tmp_path: Path, merge, mutation: str) -> None:
    """A digest that must never change unnoticed: recipes would stop giving the same model."""
    family = reference_family(tmp_path / "family")
    parameters = {"num_experts": 8, "density": 0.7, "seed": 42, "mutation": mutation}
    out = merge(family.recipe(parameters=parameters))
    assert weights_digest(out) == RECORDED[mutation]


@pytest.mark.parametrize("num_experts", [3, 6], ids=["one pass", "two passes"])
def test_devices_take_turns_without_a_trace(
    shared_family: Family, tmp_path: Path, merge, num_experts: int, monkeypatch
) -> None:
    """Two devices are two CPUs here; what counts is that blocks are spread over a list of them."""
    document = shared_family.recipe(parameters={"num_experts": num_experts})
    alone = merge(document, "alone")
    monkeypatch.setattr(
        "upit_merge.commands.run.resolve_devices",
        lambda *_, **__: (torch.device("cpu"), torch.device("cpu", 0)),
    )
    assert contents(merge(document, "several")) == contents(alone)


@pytest.mark.parametrize(
    ("parameters", "passes"),
    [
        ({}, 1),
        ({"num_experts": 1}, 1),
        ({"num_experts": 6, "parents": "random"}, 1),
        ({"num_experts": 2}, 1),
        ({"num_experts": 2, "select": "diverse"}, 2),
        ({"num_experts": 6}, 2),
    ],
    ids=str,
)
def test_inputs_are_read_once_per_pass(
    shared_family: Family, merge, monkeypatch, parameters, passes: int
) -> None:
    from upit_merge.io.checkpoint import Checkpoint

    rows = Checkpoint.rows
    read: dict[tuple[str, str], int] = {}

    def note(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        key = (self.label, name)
        read[key] = read.get(key, 0) + stop - start
        return rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", note)
    out = merge(shared_family.recipe(parameters=parameters))
    name = "model.layers.1.mlp.up_proj.weight"
    counts = [
        read[str(folder), name] for folder in (shared_family.base, shared_family.checkpoints[0])
    ]
    assert counts == [passes * 48] * 2
    assert read[str(shared_family.checkpoints[-1]), "lm_head.weight"] == 259
    # The report says how alike the checkpoints are, however they were read.
    reports = contents(out)["upit_report.json"]
    two = merge(shared_family.recipe(parameters={"num_experts": 5}), "two")
    expected = contents(two)["upit_report.json"]["checkpoint_gram"]
    torch.testing.assert_close(
        torch.tensor(reports["checkpoint_gram"]), torch.tensor(expected), rtol=1e-9, atol=0
    )


def test_more_cores_do_not_take_more_memory() -> None:
    cpu = (torch.device("cpu"),)
    threads = torch.get_num_threads()
    torch.set_num_threads(256)
    try:
        assert merge_workers(cpu, 16 << 20) * (16 << 20) <= 400 << 20
        assert merge_workers(cpu, 1 << 40) == 1
    finally:
        torch.set_num_threads(threads)


def test_work_of_another_number_of_processes_is_gone_on_with(
    shared_family: Family, tmp_path: Path
) -> None:
    """What the second of two ranks has journaled, a single process does not make again."""
    recipe = parse_recipe(shared_family.recipe(parameters={"num_experts": 3}))
    staging = Staging(tmp_path)
    staging.model.mkdir()
    with opened(recipe, OpenOptions()) as inputs:
        shards = inputs.shards(SHARD_BYTES)
        body = shards[:-1]  # the last one holds the gates, which are always made again
        done = [spec.name for shard in body[len(body) // 2 :] for spec in shard.tensors]
        # Said to be written, but nothing but zeros: so one sees that they are left alone.
        ShardWriter(staging.model, shards).close()
        Journal(tmp_path, rank=1).append({}, done)
        devices = (torch.device("cpu"),)
        merge(inputs, staging, shards, Processes(), Clock(), devices=devices, quiet=True)
    assert done
    for name, tensor in load_model(staging.model).items():
        assert bool(tensor.any()) != (name in done)
