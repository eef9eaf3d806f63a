"""ERNIE 4.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upit_merge.models.families.base import DenseFamily


class Ernie(DenseFamily):
    """The dense ERNIE 4.5 (0.3B): a Llama whose rotary embedding turns neighbouring dimensions."""

    model_type = "ernie4_5"
    title = "ERNIE 4.5"
    targets = ("ernie4_5_moe",)

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        if raw.get("use_bias"):
            return "sets use_bias, but no expert of an ERNIE-4.5-MoE has biases"
        return None

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"use_bias": False}
