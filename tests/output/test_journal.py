"""The record of what is done: torn lines, failed flushes, and what may be recorded when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from upit_merge.output import journal as resume
from upit_merge.output.identity import first_difference
from upit_merge.output.journal import Journal, Saver, has_progress


def test_a_journal_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    grams = {3: torch.randn(4, 4, dtype=torch.float64), 0: torch.full((4, 4), 1 / 3).double()}
    assert not has_progress(tmp_path)
    Journal(tmp_path, rank=1).append(grams, ["b", "a"])
    Journal(tmp_path, rank=0).append({}, ["c"])
    found = Journal(tmp_path)
    assert found.written == {"a", "b", "c"}
    assert all(torch.equal(found.grams[index], gram) for index, gram in grams.items())
    assert has_progress(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 15, 30, -1, -2])
def test_a_torn_line_counts_for_nothing_and_spoils_nothing(tmp_path: Path, kept: int) -> None:
    Journal(tmp_path).append({}, ["first"])
    path = tmp_path / "journal-0.jsonl"
    whole = path.read_bytes()
    Journal(tmp_path).append({1: torch.eye(2, dtype=torch.float64)}, ["second"])
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:kept])
    again = Journal(tmp_path)
    complete = kept == -1  # all but the line's end
    assert again.written == ({"first", "second"} if complete else {"first"})
    again.append({}, ["third"])
    assert Journal(tmp_path).written == again.written | {"third"}


def test_nothing_is_recorded_before_it_is_flushed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    flushing, go_on = threading.Event(), threading.Event()

    def flush() -> None:
        flushing.set()
        go_on.wait(10)

    with Saver(Journal(tmp_path), flush) as saver:
        saver.finished(["a"])
        flushing.wait(10)
        assert not has_progress(tmp_path)
        saver.finished(["b"])  # does not wait for the flush
        go_on.set()
    assert Journal(tmp_path).written == {"a", "b"}


def test_a_flush_that_fails_is_an_error_and_records_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)

    def flush() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"), Saver(Journal(tmp_path), flush) as saver:
        saver.finished(["a"])
    assert not has_progress(tmp_path)


def test_another_error_is_not_hidden_by_the_flush(tmp_path: Path) -> None:
    def flush() -> None:
        raise OSError("the disk is gone")

    def work() -> None:
        with Saver(Journal(tmp_path), flush) as saver:
            saver.finished(["a"])
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()


@pytest.mark.parametrize(("seconds", "size"), [(0.0, 1 << 60), (1e9, 100)])
def test_saved_by_time_or_by_size(tmp_path: Path, monkeypatch, seconds: float, size: int) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(resume, "SAVE_BYTES", size)
    saved = threading.Event()
    with Saver(Journal(tmp_path), saved.set) as saver:
        saver.finished(["a"], num_bytes=60)
        assert saved.wait(5) if seconds == 0 else not saved.is_set()
        saver.finished(["b"], num_bytes=60)
        assert saved.wait(5)


def test_differences_are_named() -> None:
    before = {"upit-merge": "1", "recipe": {"a": {"b": 1}, "c": [1]}, "file": {"x": "1", "y": "2"}}
    assert first_difference(before, before) is None
    # A key that an older record does not have is one that is not set.
    assert first_difference(before, {**before, "recipe": {**before["recipe"], "d": None}}) is None
    for change, words in [
        ({"upit-merge": "2"}, "upit-merge was 1 and is 2"),
        ({"recipe": {"a": {"b": None}, "c": [1]}}, "a.b was 1 and is not set"),
        ({"recipe": {"a": {"b": 1}, "c": [2]}}, "c has changed"),
        ({"file": {"x": "1", "y": "3"}}, "y changed since"),
        ({"file": {"x": "1"}}, "y is no longer part of it"),
        ({"file": {"x": "1", "y": "2", "z": "1"}}, "z was not part of it"),
    ]:
        assert first_difference(before, before | change) == words
