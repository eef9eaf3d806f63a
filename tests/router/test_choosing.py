"""What is chosen for a router where the losses of every setting are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.conftest import Family
from upit_merge.router import sharpness
from upit_merge.router.evaluation import run_mixture

# Nats per token below the defaults; a sample's own deviation is 0.01, of 24 samples 0.002.
SHARPER = {(0.5, 2): 0.010, (0.25, 2): 0.015, (2.0, 2): -0.01, (4.0, 2): -0.02}


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (SHARPER, (0.25, 2)),
        ({**SHARPER, (0.25, 2): 0.005}, (0.5, 2)),
        ({(2.0, 2): 0.01, (4.0, 2): 0.02}, (4.0, 2)),
        ({(0.5, 2): 0.0002, (0.25, 2): 0.0001}, (1.0, 2)),  # noise
        ({**SHARPER, (0.25, 1): 0.03}, (0.25, 1)),
        ({**SHARPER, (0.25, 1): 0.016}, (0.25, 2)),  # less than two standard errors
        ({(1.0, 1): -0.1}, (1.0, 2)),
    ],
)
def test_the_best_setting_is_taken_if_it_is_better_than_by_noise(
    gains: Mapping[tuple[float, int], float],
    expected: tuple[float, int],
    shared_family: Family,
    merge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms: list[float] = []

    def known(stage, gates):
        sums, routing = run_mixture(stage, gates)
        norms.append(float(gates[0].norm()))
        temperature = float(f"{norms[0] / norms[-1]:.3g}")
        count = stage.model.format.chosen(stage.model.architecture.config)
        targets = torch.tensor([s.num_targets for s in stage.seeds.samples], dtype=torch.float64)
        gain = gains.get((temperature, count), 0.0)
        noise = torch.Generator().manual_seed(100 * count + round(8 * temperature))
        own = torch.randn(len(sums), generator=noise, dtype=torch.float64)
        own = 0.01 * (own - own.mean()) / own.std() if (temperature, count) != (1.0, 2) else 0.0
        return targets * (5 - gain + own), routing

    monkeypatch.setattr(sharpness, "run_mixture", known)
    data = str(shared_family.seed_file(96, "many.jsonl"))
    out: Path = merge(shared_family.recipe(router={"data": data}))
    found = json.loads((out / "upit_report.json").read_text())["router"]["chosen"]
    assert found["held_out"] >= 20
    assert (found["temperature"], found["experts_per_token"]) == expected
