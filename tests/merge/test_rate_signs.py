"""What is said of the learning rate at which checkpoints were saved; judged by torch's schedules."""

import pytest
import torch
from transformers import get_scheduler

from upit_merge.io.trainer_state import TrainerState
from upit_merge.merge.rate_signs import rate_sentences, rate_when_saved

STEPS = 100


def logged(name: str, save: int, every: int = 1, **settings) -> TrainerState:
    """Notes of a run with a schedule of transformers, as its Trainer logs them."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    specific = settings.pop("specific", None)
    schedule = get_scheduler(
        name, optimizer, num_training_steps=STEPS, scheduler_specific_kwargs=specific, **settings
    )
    rates = []
    for step in range(1, 1 + save):
        optimizer.step()
        schedule.step()
        if step % every == 0:
            rates.append((step, schedule.get_last_lr()[0]))
    return TrainerState(save, STEPS, tuple(rates))


@pytest.mark.parametrize("every", [1, 10, 7])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_end_of_a_schedule_is_at_zero_however_often_it_is_logged(name: str, every: int) -> None:
    assert rate_when_saved(logged(name, STEPS, every, num_warmup_steps=10)) is None


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_middle_of_a_schedule_is_told(name: str) -> None:
    found = rate_when_saved(logged(name, 50, num_warmup_steps=10))
    assert found is not None
    assert found.kind == "mid"
    assert 0.4 < found.share < 0.7
    (kind, which, text) = next(iter(rate_sentences({3: logged(name, 50, num_warmup_steps=10)})))
    assert (kind, which) == ("rate mid", [3])
    assert "at step 50 of 100" in text


def test_a_log_older_than_the_checkpoint_says_when_it_was() -> None:
    state = logged("linear", 55, 20, num_warmup_steps=0)
    (_, _, text) = next(iter(rate_sentences({0: state})))
    assert "last logged at step 40" in text


def test_the_end_of_a_constant_rate_is_told_otherwise() -> None:
    found = rate_when_saved(logged("constant", STEPS))
    assert found is not None
    assert found.kind == "constant"


def test_a_schedule_that_ends_above_zero_has_a_floor() -> None:
    settings = {"num_warmup_steps": 0, "specific": {"min_lr_rate": 0.3}}
    found = rate_when_saved(logged("cosine_with_min_lr", STEPS, **settings))
    assert found is not None
    assert found.kind == "floor"
    assert found.share == pytest.approx(0.3, abs=0.01)


def test_ends_of_cycles_are_at_zero_and_their_middles_are_not() -> None:
    settings = {"num_warmup_steps": 0, "specific": {"num_cycles": 2}}
    middle, end = (logged("cosine_with_restarts", step, **settings) for step in (25, 49))
    assert rate_when_saved(end) is None
    assert rate_when_saved(middle) is not None


def test_the_end_of_a_cycle_may_lie_some_steps_after_the_log() -> None:
    settings = {"num_warmup_steps": 0, "specific": {"num_cycles": 2}}
    end = logged("cosine_with_restarts", 50, 17, **settings)
    assert end.rates[-1][0] == 34
    assert rate_when_saved(end) is None
    # Sooner after the same log it is still high; and long after it nobody knows.
    sooner, later = (TrainerState(step, STEPS, end.rates) for step in (36, 60))
    assert rate_when_saved(sooner) is not None
    assert rate_when_saved(later) is not None


def test_without_a_log_the_middle_is_told_and_the_end_is_not() -> None:
    found = rate_when_saved(TrainerState(50, 100, ()))
    assert found is not None
    assert found.kind == "unlogged"
    assert rate_when_saved(TrainerState(100, 100, ())) is None
    assert rate_when_saved(TrainerState(None, None, ())) is None
    assert not [*rate_sentences({0: TrainerState(None, None, ())})]


def test_a_later_checkpoint_of_the_run_knows_the_peak() -> None:
    early, late = (logged("linear", step, num_warmup_steps=50) for step in (2, 60))
    alone = rate_when_saved(early)
    assert alone is not None
    assert alone.share == 1.0
    assert rate_when_saved(early, [early, late]) is None  # 4 % of the peak
    other = TrainerState(60, 100, ((1, 1.0), (60, 1.0)))
    found = rate_when_saved(early, [early, other])  # another run
    assert found is not None
    assert found.share == 1.0
