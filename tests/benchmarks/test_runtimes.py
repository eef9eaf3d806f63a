"""benchmarks.runtimes: what its tables say of readers that agree, differ or fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.runtimes_models import CASES
from benchmarks.runtimes_probes import described, log_softmax
from benchmarks.runtimes_table import (
    HEADER,
    Row,
    common,
    compared,
    failed,
    overview,
    row_from_json,
    said_alike,
    table,
)

NAMES = {7: "<|im_end|>", 8: "</s>"}
REFERENCE = {
    "ids": [1, 2, 3],
    "tokens": [4, 5, 6],
    "pieces": [" four", " five", "six"],
    "chat": {
        "ids": [1, 9],
        "text": " yes",
        "stopped": True,
        "tokens": [3, 7],
        "logprobs": [-0.5, -1.0],
    },
}
LOGPROBS = log_softmax(np.random.default_rng(0).normal(size=(4, 10)))


def found(**changes: object) -> dict[str, object]:
    """Return what a reader found that agrees in everything but the changes."""
    same = {"errors": {}, "version": "1.0", "eos": [7], **REFERENCE}
    return {**same, **changes}


def row(quantised: bool = False, logprobs: np.ndarray = LOGPROBS, **changes: object) -> Row:
    start = Row("llama", "mixtral", "reader 1.0", quantised=quantised)
    return compared(start, REFERENCE, found(**changes), (LOGPROBS, logprobs), NAMES)


def chat(**changes: object) -> dict[str, object]:
    return {**REFERENCE["chat"], **changes}


def test_a_reader_that_agrees_is_right() -> None:
    same = row()
    assert same.right
    assert (same.ids, same.tokens, same.top, same.difference) == (True, (3, 3), 1.0, 0.0)
    assert same.chat == "same, ends"
    assert same.ends == r"`<\|im_end\|>`"  # a bar would be the end of a cell


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"ids": [1, 2]}, "**other**"),
        ({"tokens": [4, 6, 6]}, "1 of 3"),
        ({"logprobs": np.roll(LOGPROBS, 1, axis=1)}, "0%"),
        ({"chat": chat(text="yes yes", stopped=False)}, "other answer, does not end"),
        ({"chat": chat(stopped=False)}, "same, does not end"),
        ({"chat": chat(ids=[1, 1, 9])}, "**other prompt**, ends"),
        ({"errors": {"chat": "ValueError: no template"}}, "chat: ValueError: no template"),
    ],
)
def test_what_differs_is_seen_and_not_right(changes: dict, verdict: str) -> None:
    other = row(**changes)
    assert not other.right
    assert verdict in other.cells()


def test_distances_are_those_of_the_logprobs() -> None:
    """One token's logprob moved: its distance, and its share of the divergence."""
    moved = LOGPROBS.copy()
    moved[2, 5] -= 0.25
    other = row(logprobs=moved)
    assert other.difference == pytest.approx(0.25)
    assert other.divergence == pytest.approx(0.25 * math.exp(LOGPROBS[2, 5]) / 4)


def test_a_reader_may_tell_some_logprobs_only() -> None:
    """Not the last position, and of the likeliest tokens alone."""
    some = np.where(np.sort(LOGPROBS)[:, -3:-2] > LOGPROBS, np.nan, LOGPROBS)[:-1]
    other = row(logprobs=some)
    assert (other.top, other.difference, other.divergence) == (1.0, 0.0, None)
    assert other.right


def test_rounded_weights_may_change_tokens_but_not_the_model() -> None:
    shifted = log_softmax(LOGPROBS + 0.1 * np.random.default_rng(1).normal(size=LOGPROBS.shape))
    assert row(quantised=True, logprobs=shifted, tokens=[4, 9, 9]).right
    another = log_softmax(3 * np.roll(LOGPROBS, 1, axis=1))
    assert not row(quantised=True, logprobs=another).right


def test_a_reader_without_token_ids_is_judged_by_its_text_and_chat() -> None:
    told = {"errors": {}, "said": "four fivesix", "chat": chat(logprobs=[-0.5, -1.5])}
    other = compared(Row("llama", "mixtral", "reader"), REFERENCE, told, None, NAMES)
    assert other.tokens == (3, 3)
    assert other.difference == 0.5
    assert said_alike(REFERENCE["pieces"], " four fiv") == 1
    assert common([1, 2, 3], [1, 2]) == 2


def test_a_failure_is_a_row_that_says_so() -> None:
    """Short, on one line, and without what would break the table."""
    fails = failed("llama", "mixtral", "reader", "load", "no | such\nmodel " + "x" * 500)
    assert not fails.right
    text = table([row(), fails])
    assert len(text.splitlines()) == 4
    last = text.splitlines()[-1]
    assert last.startswith("| llama | `mixtral` | reader |")
    assert "load: no / such model xxx" in last
    assert len(last) < 300
    assert "…" in last
    # Columns that nobody has anything in are left out.
    assert HEADER[-1] in text.splitlines()[0]
    assert HEADER[-1] not in table([row()])


def test_the_overview_has_a_line_for_a_mixture_and_a_column_for_a_reader() -> None:
    wrong = row(tokens=[4, 6, 6])
    fails = failed("qwen2", "glm4_moe", "reader", "load", "no")
    lines = overview({"a": {"one": row(), "two": wrong}, "b": {"two": fails}}).splitlines()
    assert lines[0] == "| family | format | one | two |"
    assert lines[2:] == ["| llama | `mixtral` | 0 | **0** |", "| qwen2 | `glm4_moe` |  | no |"]


def test_rows_are_the_same_when_read_again() -> None:
    for each in (row(), failed("llama", "mixtral", "reader", "load", "no")):
        assert row_from_json(each.as_json()) == each


def test_errors_of_other_languages_lose_their_frames() -> None:
    error = ValueError("shape mismatch,\n  got [2]\n   0: core::fail\n             at lib.rs:1")
    assert described(error) == "ValueError: shape mismatch, got [2]"


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len({*names})
    assert not any(" " in name or "," in name for name in names)
