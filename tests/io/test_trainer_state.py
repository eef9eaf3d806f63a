"""What is read of trainer_state.json, and what of it is passed over."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from upit_merge.io.trainer_state import TRAINER_STATE, read_trainer_state


def state(folder: Path, **content: Any):
    (folder / TRAINER_STATE).write_text(json.dumps(content))
    return read_trainer_state("it", folder)


def test_rates_are_read_in_order_until_the_checkpoint(tmp_path: Path) -> None:
    history = [
        {"step": 20, "learning_rate": 2e-5, "loss": 1.0},
        {"step": 10, "learning_rate": "1e-05"},
        {"step": 20, "learning_rate": 3e-5},  # logged again after the run was resumed
        {"step": 40, "learning_rate": 9e-5},  # after this checkpoint
        {"step": 20, "eval_loss": 1.0},
    ]
    found = state(tmp_path, global_step=30, max_steps=100, log_history=history)
    assert found is not None
    assert found.rates == ((10, 1e-5), (20, 3e-5))
    assert (found.step, found.last_step, found.is_at_end) == (30, 100, False)


@pytest.mark.parametrize(
    "entry",
    [
        {"step": "10", "learning_rate": 1e-5},
        {"step": 10, "learning_rate": "fast"},
        {"step": 10, "learning_rate": "nan"},
        {"step": 10, "learning_rate": True},
        {"step": 10, "learning_rate": -1.0},
        {"step": 10.5, "learning_rate": 1e-5},
        {"step": 10**30, "learning_rate": 1e-5},
        {"learning_rate": 1e-5},
        [10, 1e-5],
        None,
    ],
)
def test_what_is_no_rate_is_passed_over(tmp_path: Path, entry: Any) -> None:
    good = {"step": 5, "learning_rate": 1e-5}
    found = state(tmp_path, global_step=30, log_history=[entry, good])
    assert found is not None
    assert found.rates == ((5, 1e-5),)
    assert found.last_step is None


@pytest.mark.parametrize(
    "text", ['{"global_step": NaN}', '{"log_history": 3, "max_steps": -1}', "{}"]
)
def test_a_file_without_rates_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / TRAINER_STATE).write_text(text)
    found = read_trainer_state("it", tmp_path)
    assert found is None or (found.rates, found.step, found.last_step) == ((), None, None)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00"])
def test_what_cannot_be_read_is_a_note(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TRAINER_STATE).write_text(text)
    with caplog.at_level(logging.INFO):
        assert read_trainer_state("mine", tmp_path) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(
        "What the trainer noted of checkpoint mine is passed over."
    )


def test_none_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert read_trainer_state("it", tmp_path) is None
    assert not caplog.records
