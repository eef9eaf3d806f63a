"""Tiny trainings: how they are run, and what they changed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from upit_merge.training.finetune import finetune
from upit_merge.training.run_state import RunState

Finetune = Callable[..., Path]
STEPS = 16  # 32 samples, 4 at a time, 2 epochs


def trainer_in(tmp_path: Path) -> Finetune:
    """What trains a model on 32 short samples, and returns the output folder."""
    data = tmp_path / "train.jsonl"
    rows = [{"text": f"sample {i}: " + "abcdef"[i % 6] * (5 + i % 20)} for i in range(32)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(model: Path, out: str = "trained", **settings: Any) -> Path:
        document = {
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / out),
            "data": str(data),
            "num_train_epochs": 2,
            "save_steps": 0.25,
            "logging_steps": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_length": 32,
            **settings,
        }
        config = tmp_path / f"{out}.yml"
        given = {key: value for key, value in document.items() if value is not None}
        config.write_text(yaml.safe_dump(given))
        finetune(config, quiet=True)
        return tmp_path / out

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@contextlib.contextmanager
def cut_off_after_saving() -> Iterator[None]:
    """Let the training inside die as soon as its first checkpoint is recorded."""
    saved = RunState.saved

    def dies(*arguments: Any) -> None:
        saved(*arguments)
        raise KeyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "saved", dies)
        with pytest.raises(KeyError):
            yield
