"""Materialised experts: bit for bit those of a naive implementation, however they were computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import build_family
from tests.support.naive import load_model, unlike_grown


def digest(folder: Path) -> dict[str, str]:
    """A hash per tensor, by name."""
    tensors = load_model(folder)
    return {
        name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("mutation", ["once", "compound"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_experts_equal_the_naive_ones(tmp_path, merge, mutation: str, dtype: str) -> None:
    family = build_family(tmp_path, count=3, dtype=getattr(torch, dtype), shard_size="20KB")
    parameters = {"num_experts": 7, "density": 0.6, "mutation": mutation, "seed": 11}
    out = merge(family.recipe(parameters=parameters))
    assert unlike_grown(family, out, 0.6, mutation) == []


def test_experts_in_several_blocks_equal_the_naive_ones(shared_family, merge, monkeypatch) -> None:
    monkeypatch.setattr("upit_merge.merge.blocks._BLOCK_ELEMENTS", {"cpu": 100})
    out = merge(shared_family.recipe(parameters={"num_experts": 5, "density": 0.3}))
    assert unlike_grown(shared_family, out, 0.3, "once") == []
    assert unlike_grown(shared_family, out, 0.4, "once") != []


def test_threads_and_shard_sizes_do_not_change_a_byte(shared_family, merge) -> None:
    document = shared_family.recipe(
        parameters={"num_experts": 6, "seed": 5},
        router={"data": str(shared_family.seed_file(100, "many.jsonl"))},
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merge(document, "one")
        torch.set_num_threads(2)
        two = merge(document, "two")
    finally:
        torch.set_num_threads(threads)
    # Gates are fitted by matrix products, whose last bits depend on the threads.
    first, second = load_model(one), load_model(two)
    for name, tensor in first.items():
        if name.endswith("gate.weight"):
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-3)
        else:
            assert torch.equal(second[name], tensor)
    for size in (1, 20_000, 100_000):
        sharded = merge(document, f"sharded-{size}", max_shard_bytes=size)
        assert digest(sharded) == digest(one)
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        for name, filename in index["weight_map"].items():
            assert name in load_file(sharded / filename)


def test_seed_decides_the_children_and_nothing_else(shared_family, merge) -> None:
    def run(name: str, seed: int) -> dict[str, str]:
        return digest(
            merge(shared_family.recipe(parameters={"num_experts": 5, "seed": seed}), name)
        )

    first, again, other = run("a", 1), run("b", 1), run("c", 2)
    assert first == again
    children = {n for n in first if ".experts.3." in n or ".experts.4." in n}
    gates = {n for n in first if n.endswith("gate.weight")}
    assert {n for n in first if first[n] != other[n]} == children | gates


@pytest.mark.parametrize("backbone", ["last", "average", "base", "named"])
def test_backbone(shared_family, merge, backbone: str) -> None:
    setting = str(shared_family.checkpoints[0]) if backbone == "named" else backbone
    moe = load_model(merge(shared_family.recipe(parameters={"backbone": setting})))
    models = [load_model(path) for path in shared_family.checkpoints]
    base = load_model(shared_family.base)
    for name in base:
        if ".mlp." in name:
            continue
        expected = {
            "last": models[-1][name],
            "average": torch.stack([m[name] for m in models]).mean(0),
            "base": base[name],
            "named": models[0][name],
        }[backbone]
        torch.testing.assert_close(moe[name], expected, rtol=1e-6, atol=1e-7)


def test_density_may_vary_by_tensor(shared_family, merge) -> None:
    """Filters reach the kernel: with density 1 for one projection its children are exact mixtures."""
    density = [{"filter": "down_proj", "value": 1.0}, {"value": 0.2}]
    out = merge(shared_family.recipe(parameters={"num_experts": 4, "density": density}))
    report = json.loads((out / "upit_report.json").read_text())
    weights = report["lineage"]["experts"][3]["weights"]
    moe, base = load_model(out), load_model(shared_family.base)
    models = [load_model(path) for path in shared_family.checkpoints]
    for projection, short in (("down_proj", "w2"), ("up_proj", "w3")):
        name = f"model.layers.1.mlp.{projection}.weight"
        mixture = base[name] + sum(
            w * (m[name] - base[name]) for w, m in zip(weights, models, strict=True)
        )
        child = moe[f"model.layers.1.block_sparse_moe.experts.3.{short}.weight"]
        assert torch.allclose(child, mixture, atol=1e-6) == (projection == "down_proj")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"multi_gpu": True}], ids=str)
@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_cuda_writes_the_same_bytes(tmp_path, merge, mutation: str, options) -> None:
    family = build_family(tmp_path, count=3, dtype=torch.bfloat16)
    document = family.recipe(parameters={"num_experts": 6, "mutation": mutation})
    assert digest(merge(document, "a")) == digest(merge(document, "b", **options))
