"""Copies of checkpoints, with noise and with dimensions drawn anew, against naive ones."""

from __future__ import annotations

import json
import logging
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Family, build_family
from tests.support import naive
from tests.support.commands import done
from tests.support.naive import PROJECTIONS, load_model, unlike_copies
from upit_merge.config.recipe import parse_recipe
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.counter_rng import index_hash, mask_key, normals
from upit_merge.merge.inputs import opened
from upit_merge.merge.passes import is_one_pass
from upit_merge.merge.upcycle import chosen_dimensions, measure_moments

COUNT = 1 << 20


# ---- the numbers ---------------------------------------------------------------------------


def numbers(*name: object, start: int = 0, count: int = COUNT) -> torch.Tensor:
    return normals(index_hash(mask_key(0, "element", "t"), start, count, "cpu"), *name)


def test_normals_are_the_naive_ones() -> None:
    ours = numbers(0, 3, "noise", "t", count=5000).double().numpy()
    assert np.array_equal(ours, naive.normals(5000, 0, 3, "noise", "t"))
    part = numbers(0, 3, "noise", "t", start=1234, count=100)
    assert np.array_equal(part.double().numpy(), ours[1234:1334])


@pytest.mark.parametrize("expert", range(3))
def test_moments_of_the_normals(expert: int) -> None:
    """Mean 0, variance 1, skewness 0, kurtosis 3 - 0.1, as a sum of twelve uniforms has."""
    z = numbers(0, expert, "noise", "t").double()
    sigma = 1 / math.sqrt(COUNT)
    assert abs(z.mean()) < 5 * sigma
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(1.9) * sigma
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(15) * sigma
    assert abs(z.pow(4).mean() - 2.9) < 5 * math.sqrt(85) * sigma
    assert z.abs().max() <= 6
    assert float((z.abs() > 3).double().mean()) == pytest.approx(0.0021, abs=0.0003)


def test_distribution_is_that_of_twelve_uniforms() -> None:
    """Kolmogorov-Smirnov against as many numbers of numpy's generator."""
    z = np.sort(numbers(0, 1, "noise", "t").numpy())
    reference = np.zeros(COUNT)
    generator = np.random.default_rng(0)
    for _ in range(12):
        reference += generator.random(COUNT) - 0.5
    shares = np.searchsorted(np.sort(reference), z) / COUNT
    assert np.abs(shares - np.arange(1, COUNT + 1) / COUNT).max() < 2.2 * math.sqrt(2 / COUNT)


def test_experts_tensors_and_purposes_are_independent() -> None:
    """Of the numbers, their squares and their signs; all share one hash of the index."""
    rows = [numbers(0, e, what, "t") for e in range(10) for what in ("noise", "drawn anew")]
    for form in (lambda z: z, torch.square, lambda z: (z > 0.5).float(), torch.cos):
        correlations = np.corrcoef(np.stack([form(z).numpy() for z in rows]))
        found = correlations[np.triu_indices(20, 1)] * math.sqrt(COUNT)
        assert np.abs(found).max() < 5
        assert np.square(found).mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 190))
    products = [
        float((a * b * c).double().mean()) * math.sqrt(COUNT)
        for a, b, c in combinations(rows[:10], 3)
    ]
    assert np.abs(products).max() < 5


def test_neighbours_are_independent() -> None:
    z = numbers(0, 1, "noise", "t").double()
    for lag in (1, 2, 7, 64, 4096, 65536):
        for form in (lambda z: z, lambda z: z.square() - 1):
            values = form(z)
            correlation = float((values[lag:] * values[:-lag]).mean() / values.square().mean())
            assert abs(correlation) < 5 / math.sqrt(COUNT)


def test_words_of_a_number_are_independent() -> None:
    """A sum of few dependent parts would have another variance in some part of the tensor."""
    z = numbers(0, 1, "noise", "t").double().view(256, -1)
    variances = z.square().mean(1)
    deviation = math.sqrt(1.9 / z.shape[1])
    assert float((variances - 1).abs().max()) < 5 * deviation
    assert float(variances.std()) == pytest.approx(deviation, rel=0.25)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_numbers() -> None:
    hashed = index_hash(mask_key(0, "element", "t"), 99, COUNT, "cpu")
    assert torch.equal(normals(hashed, 1, "x"), normals(hashed.cuda(), 1, "x").cpu())


# ---- the dimensions ------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.29, 29), (0.5, 50), (0.999, 99)])
def test_so_many_dimensions_are_chosen(share: float, count: int) -> None:
    chosen = chosen_dimensions(0, 1, 2, share, 100)
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist()) == naive.drawn_anew(0, 1, 2, share, 100)


def test_choices_of_experts_and_layers_are_independent() -> None:
    """Half of 4,096 dimensions each: overlaps of two are hypergeometric."""
    size = 4096
    rows = np.zeros((32, size))
    for index in range(32):
        rows[index, chosen_dimensions(5, index % 8, index // 8, 0.5, size)] = 1
    overlaps = (rows @ rows.T)[np.triu_indices(32, 1)]
    sigma = math.sqrt(size / 16)
    assert np.abs(overlaps - size / 4).max() < 5 * sigma
    assert rows.sum(0).std() == pytest.approx(math.sqrt(8), rel=0.1)


@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_moments_of_any_subset(shared_family, monkeypatch, projection: str) -> None:
    monkeypatch.setattr("upit_merge.merge.upcycle.SUM_BLOCK_ELEMENTS", 100)
    name = f"model.layers.1.mlp.{projection}.weight"
    weights = load_model(shared_family.checkpoints[0])[name].double().numpy()
    weights = weights.T if projection == "down_proj" else weights
    with opened(parse_recipe(shared_family.recipe()), OpenOptions()) as inputs:
        moments = measure_moments(inputs.checkpoints[0], name, by_row=projection != "down_proj")
    for subset in ([0], [3, 7, 8], range(48)):
        found = moments.mean_and_deviation(torch.tensor(list(subset)))
        part = weights[list(subset)]
        assert found == pytest.approx((part.mean(), part.std()), rel=1e-5)


# ---- whole models --------------------------------------------------------------------------


def copied(family: Family, models: list[int], **parameters: Any) -> dict[str, Any]:
    listed = [str(family.checkpoints[index]) for index in models]
    return family.recipe(models=listed, parameters={"expansion": "copy", **parameters})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "alteration",
    [{}, {"noise": 0.1}, {"reinitialise": 0.5}, {"noise": 0.02, "reinitialise": 0.3}],
    ids=str,
)
def test_copies_equal_the_naive_ones(tmp_path, merge, alteration, dtype: str) -> None:
    family = build_family(tmp_path, count=2, dtype=getattr(torch, dtype), shard_size="20KB")
    for models, experts in (([1], 4), ([0, 1], 5)):
        document = copied(family, models, num_experts=experts, seed=11, **alteration)
        out = merge(document, f"out-{experts}")
        assert unlike_copies(family, out, models) == []


def test_blocks_and_threads_do_not_change_a_byte(shared_family, merge, monkeypatch) -> None:
    document = copied(shared_family, [0, 1], num_experts=5, noise=0.1, reinitialise=0.5)
    monkeypatch.setattr("upit_merge.merge.blocks._BLOCK_ELEMENTS", {"cpu": 100})
    monkeypatch.setattr("upit_merge.merge.upcycle._MOST_KEPT", -7)  # one is kept
    monkeypatch.setattr("upit_merge.merge.blocks.merge_workers", lambda _devices, _bytes: 4)
    assert unlike_copies(shared_family, merge(document, max_shard_bytes=20_000), [0, 1]) == []


def test_a_reinitialised_expert_keeps_the_rest_and_the_statistics(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=1, hidden_size=128, intermediate_size=512)
    out = merge(copied(family, [0], num_experts=3, reinitialise=0.5, seed=4))
    source, moe = load_model(family.checkpoints[0]), load_model(out)
    for layer in range(2):
        changed: dict[tuple[int, str], set[int]] = {}
        for expert in range(3):
            for projection, short in PROJECTIONS.items():
                prefix = f"model.layers.{layer}"
                old = source[f"{prefix}.mlp.{projection}.weight"]
                new = moe[f"{prefix}.block_sparse_moe.experts.{expert}.{short}.weight"]
                old, new = (t.T if projection == "down_proj" else t for t in (old, new))
                rows = (old != new).any(1).nonzero().flatten()
                changed[expert, projection] = set(rows.tolist())
                assert len(rows) == 256
                assert not torch.equal(old[rows], new[rows])
                assert new[rows].std() == pytest.approx(old[rows].std().item(), rel=0.02)
                sigma = old[rows].std() / math.sqrt(old[rows].numel())
                assert abs(new[rows].mean() - old[rows].mean()) < 5 * sigma
        for expert in range(3):
            sets = [changed[expert, projection] for projection in PROJECTIONS]
            assert sets[0] == sets[1] == sets[2]
        assert changed[0, "up_proj"] != changed[1, "up_proj"]


def test_noise_is_a_share_of_the_deviation(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=1, hidden_size=128, intermediate_size=512)
    out = merge(copied(family, [0], num_experts=2, noise=0.05))
    source, moe = load_model(family.checkpoints[0]), load_model(out)
    for projection, short in PROJECTIONS.items():
        old = source[f"model.layers.0.mlp.{projection}.weight"]
        noise = [
            moe[f"model.layers.0.block_sparse_moe.experts.{e}.{short}.weight"] - old for e in (0, 1)
        ]
        for added in noise:
            assert added.std() == pytest.approx(0.05 * old.std().item(), rel=0.02)
        both = torch.corrcoef(torch.stack([added.flatten() for added in noise]))
        assert abs(both[0, 1]) < 5 / math.sqrt(old.numel())


def test_the_base_itself_may_be_copied(shared_family, merge, caplog) -> None:
    document = shared_family.recipe(
        models=[str(shared_family.base)],
        parameters={"expansion": "copy", "num_experts": 4, "reinitialise": 0.5},
    )
    with caplog.at_level(logging.WARNING):
        out = merge(document)
    assert "listed under models" not in caplog.text
    report = json.loads((out / "upit_report.json").read_text())
    assert [expert["checkpoint"] for expert in report["lineage"]["experts"]] == [0, 0, 0, 0]
    assert report["lineage"]["smallest_distance"] is None
    assert report["lineage"]["summary"] == (
        "4 experts are copies of 1 checkpoint, with 50% of the FFN's dimensions drawn anew"
    )
    card = (out / "README.md").read_text()
    assert "instruction-tuning" not in card
    assert "4 experts are copies of 1 checkpoint, with 50% of" in card


@pytest.mark.parametrize("alteration", [{}, {"noise": 0.1}, {"reinitialise": 0.25}], ids=str)
def test_copies_are_planned_and_verified(family: Family, alteration: dict[str, float]) -> None:
    document = copied(family, [0, 2], num_experts=5, **alteration)
    recipe, out = str(family.write_recipe(document)), str(family.root / "out")
    planned = done("plan", recipe, "--quiet")
    assert "5 experts are copies of 2 checkpoints" in planned.output
    assert ("Closest two experts" in planned.output) == (not alteration)
    done("run", recipe, out, "--quiet")
    done("verify", out)


def test_broken_weights_are_named(family: Family, merge) -> None:
    from safetensors.torch import save_file

    from upit_merge.errors import UpitError

    path = family.checkpoints[0] / "model.safetensors"
    tensors = load_model(family.checkpoints[0])
    tensors["model.layers.1.mlp.up_proj.weight"][47, 3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    document = copied(family, [0], num_experts=2, reinitialise=0.5) | {"dtype": "float16"}
    with pytest.raises(UpitError, match=r"NaN or infinite weights in .*1\.mlp\.up_proj"):
        merge(document)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"multi_gpu": True}], ids=str)
def test_cuda_writes_the_same_copies(tmp_path, merge, options: dict[str, Any]) -> None:
    family = build_family(tmp_path, count=2, dtype=torch.bfloat16)
    document = copied(family, [0, 1], num_experts=4, noise=0.1, reinitialise=0.5)
    first, second = (load_model(merge(document, n, **o)) for n, o in (("a", {}), ("b", options)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_pass_suffices(shared_family) -> None:
    document = copied(shared_family, [0, 1], num_experts=5)
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        assert is_one_pass(inputs)
