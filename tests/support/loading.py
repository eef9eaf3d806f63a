"""Models as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM


def load(folder: Path, **options: Any) -> Any:
    """Load with transformers and insist that every weight has its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def is_gate(name: str) -> bool:
    return name.endswith("gate.weight")
