"""A base that the checkpoints were not trained from is noticed; a right one is not doubted."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.conftest import build_family
from tests.support.commands import done
from upit_merge.merge.right_base import looks_foreign

DOUBT = "may not be the model they were trained from"
NAMED = "is named like a checkpoint of the run that is merged"


def gram(points: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    deltas = points - base
    return deltas @ deltas.T


def run(count: int, drift: float, seed: int) -> torch.Tensor:
    """Points of a run from the origin, (count, 4096): a walk, with a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, 4096, generator=generator, dtype=torch.float64)
    direction = torch.randn(4096, generator=generator, dtype=torch.float64)
    return (steps + drift * direction).cumsum(0)


@pytest.mark.parametrize("drift", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_runs(count: int, drift: float, seed: int) -> None:
    points = run(count + 1, drift, seed)
    assert not looks_foreign(gram(points[:-1], torch.zeros(4096, dtype=torch.float64)))
    if drift:  # else the walk's ends may have nothing in common
        assert looks_foreign(gram(points[:-1], points[-1]))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_specialists(count: int) -> None:
    points = torch.randn(count + 1, 4096, generator=torch.Generator().manual_seed(count)).double()
    assert not looks_foreign(gram(points[:-1], torch.zeros(4096, dtype=torch.float64)))
    # One that was trained a little further than the others are from each other.
    assert looks_foreign(gram(points[:-1], points[-1] * 1.2))


def test_nothing_to_tell_by() -> None:
    assert not looks_foreign(torch.zeros(3, 3, dtype=torch.float64))
    assert not looks_foreign(torch.ones(1, 1, dtype=torch.float64))
    assert not looks_foreign(torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64))


@pytest.fixture
def warned(caplog):
    """Run a command; return what it warns of."""

    def run(*words: object) -> str:
        caplog.clear()
        done(*words, "--quiet")
        return caplog.text

    return run


def test_last_checkpoint_as_base(tmp_path, warned) -> None:
    family = build_family(tmp_path, count=4)
    recipe = family.write_recipe(family.recipe())
    assert DOUBT not in warned("plan", recipe)
    swapped = family.recipe(models=[str(path) for path in family.checkpoints[:2]])
    swapped["base_model"] = str(family.checkpoints[-1])
    told = warned("plan", family.write_recipe(swapped))
    assert NAMED in told
    assert f"{DOUBT}; give that one as base_model" in told
    # Under another name it is known by its deltas alone.
    shutil.copytree(family.checkpoints[-1], tmp_path / "final")
    swapped["base_model"] = str(tmp_path / "final")
    told = warned("plan", family.write_recipe(swapped))
    assert NAMED not in told
    assert DOUBT in told
    assert DOUBT in warned("run", family.write_recipe(swapped), tmp_path / "out")


def test_copies_are_measured_against_nothing(tmp_path, warned) -> None:
    family = build_family(tmp_path, count=4)
    document = family.recipe(
        models=[str(path) for path in family.checkpoints[:2]],
        parameters={"expansion": "copy", "num_experts": 4},
    )
    document["base_model"] = str(family.checkpoints[-1])
    told = warned("plan", family.write_recipe(document))
    assert NAMED not in told
    assert DOUBT not in told
