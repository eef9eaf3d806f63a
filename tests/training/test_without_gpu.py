"""Training where there is no GPU: what is chosen, and what cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils import is_torch_bf16_gpu_available

from tests.support.spoilt import refusal
from upit_merge.training.settings import load_job


def written(tmp_path: Path, **keys: Any) -> Path:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "some text"}\n')
    path = tmp_path / "train.yml"
    document = {"model_name_or_path": "base", "data": str(data), "output_dir": str(tmp_path / "o")}
    path.write_text(yaml.safe_dump({**document, **keys}))
    return path


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="there is a GPU")
def test_bf16_without_a_gpu(tmp_path: Path) -> None:
    path = written(tmp_path, bf16=True)
    assert refusal(load_job, path) == (
        f"{path}: bf16 is true, but there is no GPU here that computes in bfloat16; remove it, so "
        "that training is in float32, or add use_cpu: true, for bfloat16 on the CPU."
    )
    assert load_job(written(tmp_path, bf16=True, use_cpu=True)).training.bf16
    assert not load_job(written(tmp_path)).training.bf16


@pytest.mark.parametrize("has_gpu", [False, True])
def test_use_cpu_is_the_same_with_and_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    """float32, unless bfloat16 is asked for."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    assert not load_job(written(tmp_path, use_cpu=True)).training.bf16
    assert load_job(written(tmp_path, use_cpu=True, bf16=True)).training.bf16
    assert load_job(written(tmp_path, use_cpu=True), ["--bf16", "true"]).training.bf16
    assert not load_job(written(tmp_path, use_cpu=True, fp16=True)).training.bf16


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, True),
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
    ],
)
def test_activations_are_computed_again_unless_told_otherwise(
    tmp_path: Path, keys: dict[str, bool], expected: bool
) -> None:
    """By either of its names."""
    training = load_job(written(tmp_path, **keys)).training
    found = getattr(training, "activation_checkpointing", training.gradient_checkpointing)
    assert bool(found) == expected
