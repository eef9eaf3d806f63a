"""`evaluate`: margins of error of other models, and the average of a mixture's own experts."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import t
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.commands import done


@pytest.fixture
def data(four: Family) -> Path:
    return four.seed_file(12, "held-out.jsonl")


def evaluated(out: Path, data: Path, *words: object) -> dict[str, Any]:
    file = out.parent / "numbers.json"
    output = done("evaluate", out, "--data", data, "--json", file, *words).output
    return {**json.loads(file.read_text()), "output": output}


def by_transformers(model: torch.nn.Module, folder: Path, data: Path) -> list[tuple[float, int]]:
    """Nats summed over the targets of every sample, and how many these are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for line in data.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        found.append((loss * (ids.shape[1] - 1), ids.shape[1] - 1))
    return found


def perplexity(losses: list[tuple[float, int]]) -> float:
    return math.exp(sum(nats for nats, _ in losses) / sum(count for _, count in losses))


def test_other_models_have_paired_margins_of_error(moe: Path, four: Family, data: Path) -> None:
    words = ("--no-rivals", "--no-experts", "--against", f"the base={four.base}")
    found = evaluated(moe, data, *words)
    (other,) = found["others"]
    ours = by_transformers(AutoModelForCausalLM.from_pretrained(moe).eval(), moe, data)
    base = AutoModelForCausalLM.from_pretrained(four.base).eval()
    theirs = by_transformers(base, four.base, data)
    pairs = [(b - a, count) for (a, count), (b, _) in zip(ours, theirs, strict=True)]
    total = sum(count for _, count in pairs)
    gain = sum(nats for nats, _ in pairs) / total
    residuals = [nats - gain * count for nats, count in pairs]
    standard_error = math.sqrt(len(pairs) * statistics.variance(residuals)) / total
    assert other["samples"] == len(pairs) == 12
    assert other["gain"] == pytest.approx(gain, rel=1e-3, abs=1e-6)
    expected = t.ppf(0.975, len(pairs) - 1) * standard_error
    assert other["error"] == pytest.approx(expected, rel=1e-3)
    assert [rival["kind"] for rival in found["worth"]["rivals"]] == ["other"]
    assert "Too few samples to tell" in found["worth"]["verdict"]  # less than 20
    assert found["output"].count(found["worth"]["verdict"]) == 1


def test_no_rivals_and_no_others_is_no_verdict(moe: Path, data: Path) -> None:
    found = evaluated(moe, data, "--no-rivals", "--no-experts")
    assert "worth" not in found
    assert "Whether the mixture is worth its bytes was not measured" in found["output"]


def test_a_mixture_from_elsewhere_is_compared_with_its_own_experts(moe: Path, data: Path) -> None:
    (moe / "upit_report.json").unlink()
    found = evaluated(moe, data)
    rivals = {rival["kind"]: rival for rival in found["worth"]["rivals"]}
    assert set(rivals) == {"single", "average", "random"}
    assert found["worth"]["left_out"].startswith("What it was made from is not known")
    assert found["output"].count(found["worth"]["left_out"]) == 1
    # A mixture of equal experts is a dense model, whatever its gates do.
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[:] = weight.data.mean(0)
    average = perplexity(by_transformers(model, moe, data))
    assert rivals["average"]["perplexity"] == pytest.approx(average, rel=1e-4)
    best = int(rivals["single"]["facts"]["expert"])
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[:] = weight.data[best].clone()
    single = perplexity(by_transformers(model, moe, data))
    assert rivals["single"]["perplexity"] == pytest.approx(single, rel=1e-4)
    alone = found["groups"]["all"]["experts_alone"]
    assert best == alone.index(min(alone))
    again = evaluated(moe, data)
    assert "was measured on these samples before: nothing of it was computed" in again["output"]
    assert again["worth"] == found["worth"]
