"""A pipeline's file, written for a family of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Family

TRAINING = {"per_device_train_batch_size": 8, "max_length": 32, "learning_rate": 1e-2}
Written = Callable[..., Path]


def writer(tmp_path: Path, four: Family) -> Written:
    """Writes a pipeline's file; keyword arguments replace its keys, None removes one."""
    data = tmp_path / "train.jsonl"
    kinds = ("letters", "digits")
    rows = [
        {"text": f"sample {i}: " + ("abcdef", "123456")[i % 2][i % 6] * 9, "kind": kinds[i % 2]}
        for i in range(32)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(out: str = "run", **keys: Any) -> Path:
        document = {
            "base_model": str(four.base),
            "output": str(tmp_path / out),
            "data": str(data),
            "prepare": {**TRAINING, "save_steps": 0.25, "train_modules": "ffn"},
            "merge": {"parameters": {"num_experts": 5}},
            "router": {"sample": 24},
            "post_train": TRAINING,
            "evaluate": {"data": str(data), "group_by": "kind"},
            **keys,
        }
        path = tmp_path / f"{out}.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
        return path

    return write
