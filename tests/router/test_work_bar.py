"""Bars of the router's stage: in samples, with a time left that can be relied on."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import build_family
from upit_merge.config.router import RouterSettings
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router import stage as stages
from upit_merge.router.assignment import assigned
from upit_merge.router.evaluation import run_mixture
from upit_merge.router.pretrain import seed_set_for
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.work_bar import WorkBar


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still unless it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_parts_of_different_cost(clock) -> None:
    """One sweep forwards, one backwards that costs 3.3 times as much, a little of something else."""
    tokens = 1000
    bar = WorkBar(600, tokens * (1 + 3.3) + 70, "losses", quiet=True)
    assert bar.seconds_left is None
    backwards = bar.part(3.3)
    for step, (advance, pieces, seconds) in enumerate(
        [(bar.advance, 100, 1.0)] * 10 + [(backwards, 100, 3.3)] * 10 + [(bar.advance, 70, 0.7)]
    ):
        if step > 0:
            assert bar.seconds_left == pytest.approx(43.7 - (clock[0] - 100))
        clock[0] += seconds
        advance(pieces)
    assert bar.share == pytest.approx(1)
    assert bar.seconds_left == pytest.approx(0)


def test_what_an_earlier_run_did_says_nothing_of_the_speed(clock) -> None:
    bar = WorkBar(100, 1000, "losses", quiet=True)
    bar.skip(500)
    assert bar.seconds_left is None
    clock[0] += 10
    bar.advance(100)
    assert bar.seconds_left == pytest.approx(40)


def test_work_may_turn_out_to_be_more_or_less(clock) -> None:
    bar = WorkBar(100, 1000, "losses", quiet=True)
    clock[0] += 10
    bar.advance(100)
    bar.expect(1000)
    assert (bar.share, bar.seconds_left) == (pytest.approx(0.05), pytest.approx(190))
    bar.expect(-1900)
    assert (bar.share, bar.seconds_left) == (1, 0)


def test_what_is_printed(clock, capsys) -> None:
    with WorkBar(600, 9000.0, "losses of the experts", quiet=False) as bar:
        clock[0] += 62
        for _ in range(93):
            bar.advance(6.0)
        bar.refresh()
        printed = capsys.readouterr().err.split("\r")[-1]
        assert re.search(r"losses of the experts: +6%.* 37/600 \[01:02<15:38, ", printed)
        bar.skip(9000 - 93 * 6.0)
    assert "600/600" in capsys.readouterr().err


def test_nothing_to_do() -> None:
    with WorkBar(0, 0, "nothing", quiet=True) as bar:
        bar.advance(0)
        assert bar.share == 0


class Timed(WorkBar):
    """Notes the time left at the first tenth, and the time at the end."""

    found: ClassVar[list[tuple[str, int, float, float]]] = []

    def __init__(self, units: int, work: float, description: str, **options: Any) -> None:
        super().__init__(units, work, description, **options)
        self.named = description, units

    def advance(self, work: float) -> None:
        super().advance(work)
        if self.share >= 0.1 and not hasattr(self, "_told"):
            self._told = time.monotonic(), self.seconds_left
            return

    def close(self) -> None:
        if hasattr(self, "_told"):
            at, left = self._told
            real = time.monotonic() - at
            self.found.append((*self.named, left, real))
            assert self.share == pytest.approx(1)
            del self._told
        super().close()


def test_the_time_left_after_a_tenth_of_a_real_stage(tmp_path: Path, monkeypatch, merge) -> None:
    """Losses, gates and an evaluation: near what each then takes, though other tests run beside."""
    family = build_family(tmp_path / "family", hidden_size=192, num_hidden_layers=12)
    out = merge(family.recipe())
    settings = RouterSettings(data=str(family.seed_file(200)), batch_tokens=1024)
    monkeypatch.setattr(stages, "WorkBar", Timed)
    with opened_mixture(out) as moe:
        model = LayerwiseMixture(moe, torch.device("cpu"))
        seeds = seed_set_for(model, out, settings, 0)
        stage = RouterStage(model, seeds, settings, 0, tmp_path, quiet=True)
        worst = {}
        for _ in range(3):  # a machine that is busy with something else may spoil one
            monkeypatch.setattr(Timed, "found", [])
            stage.gates(assigned(stage))
            run_mixture(stage)
            for name, units, left, real in Timed.found:
                assert units == 200
                worst[name] = min(worst.get(name, 9.0), abs(left / real - 1))
            if max(worst.values()) < 1 / 3:  # with nothing else to do
                break
    assert set(worst) == {"losses of the experts", "fitting the gates", "the mixture"}
    assert max(worst.values()) < 2 / 3, worst
