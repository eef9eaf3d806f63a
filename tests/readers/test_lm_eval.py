"""The task of recipes/lm_eval, run by lm-evaluation-harness itself on a tiny mixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family

FOLDER = Path(__file__).parents[2] / "recipes" / "lm_eval"


def questions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "arithmetic.jsonl").read_text().splitlines()]


def test_every_question_has_one_right_answer() -> None:
    rows = questions()
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for row in rows:
        first, sign, second = row["question"].split()
        right = str(operations[sign](int(first), int(second)))
        assert [i for i, choice in enumerate(row["choices"]) if choice == right] == [row["answer"]]
        assert len(set(row["choices"])) == 4
    assert len({row["question"] for row in rows}) == len(rows)
    places = [sum(row["answer"] == place for row in rows) for place in range(4)]
    assert places == [len(rows) // 4] * 4  # always the same place scores no better than chance


def log_likelihood(out: Path, context: str, answer: str) -> float:
    """Of an answer after its question, in nats, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer(context)["input_ids"]
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logs.gather(1, ids[0, len(prompt) :, None]).sum())


def test_the_harness_scores_a_mixture(
    family: Family, merge: Callable[..., Path], tmp_path: Path
) -> None:
    out = merge(family.recipe(parameters={"num_experts": 4}))
    command = f"--model hf --model_args pretrained={out},dtype=float32 --device cpu"
    command += " --tasks upit_arithmetic --include_path . --batch_size 8 --log_samples"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command.split(), "--output_path", tmp_path / "results"],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    results = json.loads(next(tmp_path.glob("results/*/results_*.json")).read_text())
    samples = [
        json.loads(line)
        for line in next(tmp_path.glob("results/*/samples_*.jsonl")).read_text().splitlines()
    ]
    rows = questions()
    assert [sample["doc"] for sample in sorted(samples, key=lambda s: s["doc_id"])] == rows
    correct = 0
    for sample in samples:
        scores = [float(score) for (score, _greedy), *_ in sample["resps"]]
        correct += scores.index(max(scores)) == sample["doc"]["answer"]
    assert results["results"]["upit_arithmetic"]["acc,none"] == pytest.approx(correct / len(rows))
    first = samples[0]
    for (score, _greedy), choice in zip(
        (response[0] for response in first["resps"]), first["doc"]["choices"], strict=True
    ):
        expected = log_likelihood(out, f"{first['doc']['question']} =", f" {choice}")
        assert float(score) == pytest.approx(expected, abs=1e-3)
