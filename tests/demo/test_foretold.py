"""The demo says how long it will take here: from steps that it has timed."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upit_merge.demo import foretell, run, stages, training
from upit_merge.demo.corpus import load_domains
from upit_merge.demo.foretell import STEPS_AROUND, STEPS_OF_PIPELINE, foretold_time, time_step
from upit_merge.demo.progress import open_demo
from upit_merge.demo.training import TrainingBudget, train_demo_models

SMALL = TrainingBudget(
    vocab_size=400, hidden_size=64, layers=1, context=64, base_steps=6, sft_rounds=1, sft_steps=4
)
# Steps of the default: 700, and six visits of 160.
ALL_STEPS = 700 + 6 * 160


def test_a_step_is_timed_as_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def slow(model: torch.nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        taken.append((sum(p.numel() for p in model.parameters()), tuple(batch.shape)))
        time.sleep(0.5 if len(taken) <= 2 else 0.02)  # the first ones do not count

    monkeypatch.setattr(foretell, "training_step", slow)
    assert 0.02 <= time_step(SMALL) < 0.2
    monkeypatch.undo()
    taken_in_training = []
    original = training.training_step
    monkeypatch.setattr(
        training,
        "training_step",
        lambda model, batch, optimizer: (
            taken_in_training.append((sum(p.numel() for p in model.parameters()), batch.shape)),
            original(model, batch, optimizer),
        ),
    )
    domains = [replace(domain, train=domain.train[:40]) for domain in load_domains()]
    train_demo_models(tmp_path, domains, budget=SMALL, quiet=True)
    assert len(taken_in_training) == 6 + 3 * 4
    # The same sizes, but for words that the tokenizer did not find.
    assert taken[0][1] == tuple(taken_in_training[0][1])
    assert taken[0][0] == pytest.approx(taken_in_training[0][0], rel=0.1)


def test_a_slow_machine_is_not_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretell, "_LONGEST", 0.1)
    monkeypatch.setattr(foretell, "training_step", lambda *_: time.sleep(0.1))
    started = time.perf_counter()
    assert 0.1 <= time_step(SMALL) < 0.3
    assert time.perf_counter() - started < 2


def test_timing_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    time_step(SMALL)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seconds", [0.01, 0.06, 2.0])
def test_what_is_told_follows_the_machine(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(foretell, "time_step", lambda budget: seconds)
    told = foretold_time(TrainingBudget(), [], 340)
    duration = {0.01: "20 s", 0.06: "2 min", 2.0: "67 min"}[seconds]
    assert told.startswith(f"This takes about {duration} on this machine")
    assert f"{ALL_STEPS:,} training steps" in told


def test_what_is_trained_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretell, "time_step", lambda budget: 0.1)
    budget = TrainingBudget()
    some = foretold_time(budget, ["base", "sft/checkpoint-160"], 200)
    assert some.startswith("This takes about 2 min on")  # 100 s
    assert "800 training steps" in some
    everything = [name for name, _ in budget.cycles()]
    assert "(what follows the training)" in foretold_time(budget, everything, 200)
    assert "about 20 s" in foretold_time(budget, everything, 200)


def test_names_of_the_models_are_those_of_the_training(tmp_path: Path) -> None:
    domains = [replace(domain, train=domain.train[:40]) for domain in load_domains()]
    made = train_demo_models(tmp_path, domains, budget=SMALL, quiet=True)
    paths = [made.base, *made.checkpoints]
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert [name for name, _ in SMALL.cycles()] == names


def test_a_demo_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Begun(Exception):
        pass

    def stop(*_args: object, **_options: object) -> None:
        raise Begun

    timed: list[TrainingBudget] = []
    monkeypatch.setattr(foretell, "time_step", lambda budget: timed.append(budget) or 0.05)
    for module in (run, stages):
        monkeypatch.setattr(module, "load_domains", stop)
    monkeypatch.setattr(stages, "check_trl", lambda: None)
    for call, steps in (
        (run.run_demo, ALL_STEPS + STEPS_AROUND),
        (stages.run_all_stages, 700 + STEPS_OF_PIPELINE),
    ):
        folder = tmp_path / call.__name__
        with pytest.raises(Begun):
            call(folder)
        (minutes,) = re.findall(r"This takes about (\d+) min", capsys.readouterr().out)
        assert int(minutes) == round(steps * 0.05 / 60)
        with pytest.raises(Begun):
            call(folder, quiet=True)
        assert capsys.readouterr().out == ""
    assert len(timed) == 2


def test_the_time_left_does_not_count_what_was_trained_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are passed over take no time, and must not make the rest look short."""
    domains = [replace(domain, train=domain.train[:40]) for domain in load_domains()]
    folder = open_demo(tmp_path / "cut", seed=0)
    original, saved = training.save, []

    def cut_off(path: Path, *rest: object) -> Path:
        saved.append(path)
        if len(saved) > 2:
            raise KeyboardInterrupt
        return original(path, *rest)

    monkeypatch.setattr(training, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_demo_models(folder.root, domains, quiet=True, budget=SMALL, progress=folder)
    monkeypatch.setattr(training, "save", original)

    bars: list[training.WorkBar] = []
    seen: list[tuple[float, float | None]] = []
    step = training.training_step

    class Watched(training.WorkBar):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    def looked_at(*args: object) -> None:
        seen.append((bars[0].share, bars[0].seconds_left))
        time.sleep(0.02)
        step(*args)

    monkeypatch.setattr(training, "WorkBar", Watched)
    monkeypatch.setattr(training, "training_step", looked_at)
    train_demo_models(folder.root, domains, quiet=True, budget=SMALL, progress=folder)
    assert len(seen) == 2 * 4
    assert seen[0] == (10 / 18, None)
    # Seven steps are left after the first, of at least 20 ms each.
    assert seen[1][1] >= 7 * 0.02
    assert bars[0].share == 1
