"""Experts without samples: their routing vectors tie with nobody's, and the others stay."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Family
from tests.support.commands import done
from upit_merge.models.gates import TIE_BREAKER, distinct_gates
from upit_merge.router import pretrain, sharpness

OBJECTIVES: dict[str, dict[str, Any]] = {
    "one_vs_rest": {},
    "softmax": {"objective": "softmax"},
    "ridge": {"objective": "ridge"},
    "hidden": {"objective": "hidden"},
    "upit": {"objective": "upit"},
    "upit, train_experts": {"objective": "upit", "upit": {"train_experts": True, "epochs": 1}},
    "random": {"objective": "random"},
    "refined": {"refine": {"steps": 2, "tokens": 64}},
}


def stored_gates(out: Path) -> list[Tensor]:
    tensors = load_file(out / "model.safetensors")
    return [tensors[name] for name in sorted(tensors) if name.endswith(".gate.weight")]


def spread_of(gate: Tensor) -> Tensor:
    """Root mean square of the vectors' distances from their mean."""
    return (gate.float() - gate.float().mean(0)).square().sum(1).mean().sqrt()


def assert_no_ties(gate: Tensor) -> None:
    """No two rows are as good as equal, and no token's logits tie, as float32 has them."""
    apart = torch.pdist(gate.float()) / spread_of(gate)
    assert apart.min() > TIE_BREAKER / 2
    inputs = torch.randn(2000, gate.shape[1], generator=torch.Generator().manual_seed(5))
    logits = inputs @ gate.float().T
    for one, other in itertools.combinations(range(len(gate)), 2):
        assert not torch.equal(gate[one], gate[other])
        assert not (logits[:, one] == logits[:, other]).any()


@pytest.fixture
def copies(shared_family: Family, tmp_path: Path) -> dict[str, Any]:
    """A recipe of five copies of one checkpoint: the first gets all the samples."""
    (path := tmp_path / "seed.jsonl").write_text(
        "".join(json.dumps({"text": "abcdef"[i % 6] * (4 + i)}) + "\n" for i in range(12))
    )
    return shared_family.recipe(
        models=[str(shared_family.checkpoints[0])],
        dtype="bfloat16",
        parameters={"num_experts": 5, "expansion": "copy"},
        router={"data": str(path)},
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_copies_of_a_checkpoint_never_tie(merge: Any, copies: dict[str, Any], name: str) -> None:
    copies["router"] |= OBJECTIVES[name]
    gates = stored_gates(merge(copies))
    assert len(gates) == 2
    for gate in gates:
        assert gate.dtype == torch.bfloat16
        assert_no_ties(gate)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["one_vs_rest", "ridge"])
def test_who_has_samples_keeps_the_vector(
    merge: Any,
    copies: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    compute: str,
) -> None:
    """Only experts 2 to 4 have none; 0 and 1 get the bytes that they had without any of this."""
    rows = [{"text": "abcdef"[i % 6] * (4 + i), "expert": i % 2} for i in range(12)]
    data = Path(copies["router"]["data"])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    copies["router"] |= {"assign": {"column": "expert"}, "objective": objective, "compute": compute}
    found = stored_gates(merge(copies))
    for module in (pretrain, sharpness):
        monkeypatch.setattr(module, "distinct_gates", lambda gates, *_: gates)
    before = stored_gates(merge(copies, "before"))
    for new, old in zip(found, before, strict=True):
        assert torch.equal(new[:2], old[:2])
        # The fault: they are one vector, up to the rounding of the fit.
        torch.testing.assert_close(old[2:], old[2].expand(3, -1), rtol=1e-2, atol=1e-3)
        assert_no_ties(new)
        moved = (new[2:] - old[2:]).float().norm(dim=1)
        expected = torch.full((3,), TIE_BREAKER)
        torch.testing.assert_close(moved / spread_of(old), expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4])
def test_the_same_up_to_the_rounding_of_a_fit(noise: float) -> None:
    torch.manual_seed(0)
    gate = torch.cat([torch.randn(2, 64), torch.zeros(3, 64)])
    (found,) = distinct_gates([gate + noise * torch.randn(5, 64)], torch.float32, 0)
    assert_no_ties(found)
    moved = (found - gate).norm(dim=1) / spread_of(gate)
    assert moved[:2].max() < 1e-3  # the noise
    torch.testing.assert_close(moved[2:], torch.full((3,), TIE_BREAKER), rtol=0.05, atol=0)


def test_a_single_expert_without_samples_ties_with_nobody_and_stays() -> None:
    gate = torch.cat([torch.randn(3, 16), torch.zeros(1, 16)])
    (same,) = distinct_gates([gate], torch.bfloat16, 0)
    assert torch.equal(same, gate)


def test_an_experts_direction_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    gate = torch.randn(6, 16)
    two, three = gate.clone(), gate.clone()
    two[4:] = 0
    three[3:] = 0
    (first,), (second,) = (distinct_gates([g], torch.float32, 1) for g in (two, three))
    directions = [torch.nn.functional.normalize(g[4:], dim=1) for g in (first, second)]
    torch.testing.assert_close(*directions)
    other, again = (distinct_gates([two], torch.float32, seed)[0] for seed in (2, 1))
    assert not torch.equal(first, other)
    assert torch.equal(first, again)


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whatever_the_rounding_leaves(common: float, dtype: torch.dtype) -> None:
    """Vectors that share a part so large that the tie-breaker is lost beside it at first."""
    torch.manual_seed(0)
    part = torch.randn(1, 32).sign() * common
    gate = part + torch.cat([torch.randn(2, 32) / 100, torch.zeros(6, 32)])
    (found,) = distinct_gates([gate], dtype, 0)
    assert len(found.to(dtype).unique(dim=0)) == 8
    assert torch.equal(found[:2], gate[:2])
    assert (found - gate).norm(dim=1).max() < 0.3 * max(1.0, common)


def test_all_alike() -> None:
    """No vector says anything: they part all the same, but for a gate of nothing but zeros."""
    (found,) = distinct_gates([torch.ones(4, 16)], torch.bfloat16, 0)
    assert_no_ties(found.bfloat16())
    (found,) = distinct_gates([torch.zeros(4, 16)], torch.bfloat16, 0)
    assert_no_ties(found.bfloat16())


def test_only_the_rows_that_are_named() -> None:
    gate = torch.cat([torch.randn(1, 16), torch.zeros(3, 16)])
    (found,) = distinct_gates([gate], torch.float32, 0, rows=[3])
    assert torch.equal(found[:3], gate[:3])
    assert not torch.equal(found[3], gate[3])


def test_shrinking_parts_what_tied_before(merge: Any, copies: dict[str, Any], monkeypatch) -> None:
    """A mixture of an earlier version, with ties, has none when it is shrunk."""
    with monkeypatch.context() as patch:
        for module in (pretrain, sharpness):
            patch.setattr(module, "distinct_gates", lambda gates, *_: gates)
        out = merge(copies)
    gate = stored_gates(out)[0]
    assert torch.pdist(gate[1:].float()).max() < TIE_BREAKER / 8 * spread_of(gate)  # the fault
    done("shrink", out, "--experts", "3", "--data", copies["router"]["data"])
    for gate in stored_gates(out):
        assert_no_ties(gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_that_only_rounding_makes_equal(dtype: torch.dtype) -> None:
    """The same of experts with samples, beside whose common part all else is lost."""
    torch.manual_seed(0)
    gate = 1e4 * torch.randn(1, 32).sign() + torch.randn(8, 32) / 100
    assert len(gate.to(dtype).unique(dim=0)) == 1
    (found,) = distinct_gates([gate], dtype, 0)
    assert len(found.to(dtype).unique(dim=0)) == 8
