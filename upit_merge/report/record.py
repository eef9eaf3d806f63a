"""`upit_report.json`: what was done, in enough detail to check it or to do it again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from upit_merge import __version__
from upit_merge.expansion.lineage import Lineage
from upit_merge.expansion.similarity import cosine
from upit_merge.recipe import Recipe

_PACKAGES = ("mergekit", "torch", "transformers", "safetensors")

# Digits that agree between machines; the rest is rounding of differently ordered sums.
_DIGITS = 10


def versions() -> dict[str, str]:
    """Of the packages that had a part in the result."""
    found = {"python": platform.python_version(), "upit-merge": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in matrix.tolist()]


def merge_record(
    recipe: Recipe,
    labels: Sequence[str],
    gram: torch.Tensor,
    lineage: Lineage,
    num_experts_per_token: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The part of the report that the merge itself decides."""
    total = gram.sum(0)
    return {
        "format": 1,
        "method": "upit",
        "versions": versions(),
        "seed": recipe.seed,
        "parameters": recipe.parameters.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "experts_per_token": num_experts_per_token,
        "base_model": recipe.base_model,
        "checkpoints": list(labels),
        "checkpoint_gram": _rounded(total),
        "checkpoint_cosine": _rounded(cosine(total)),
        "lineage": {
            "summary": lineage.summary,
            **lineage.to_report(),
            "expected_gram": None if lineage.altered else _rounded(lineage.gram),
            "smallest_distance": lineage.smallest_distance(),
            "mean_distance": lineage.mean_distance(),
            "largest_cosine": lineage.largest_cosine(),
        },
    }
