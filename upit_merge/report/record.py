"""The first content of `upit_report.json`: enough to check what was done, or to do it again."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from upit_merge import __version__
from upit_merge.config.recipe import Recipe
from upit_merge.io.sources import DenseModel
from upit_merge.merge.lineage import Lineage
from upit_merge.merge.similarity import cosine
from upit_merge.models.chat_template import own_template
from upit_merge.models.formats import MixtureFormat
from upit_merge.models.mixture import parameter_counts
from upit_merge.models.tokenizer import has_tokenizer
from upit_merge.report.sources import describe_sources

_PACKAGES = ("mergekit", "torch", "transformers", "safetensors")

# Digits that agree between machines; the rest is rounding of differently ordered sums.
_DIGITS = 10


def versions() -> dict[str, str]:
    """Return the versions of the packages that had a part in the result."""
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
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
    gram: torch.Tensor,
    lineage: Lineage,
    num_experts_per_token: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the part of the report that the merge itself decides."""
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
        "checkpoints": [checkpoint.label for checkpoint in checkpoints],
        "sources": {
            "base": describe_sources([base])[0],
            "checkpoints": describe_sources(checkpoints),
        },
        "checkpoint_gram": _rounded(total),
        "checkpoint_cosine": _rounded(cosine(total)),
        "lineage": {
            "summary": lineage.summary,
            **lineage.to_report(),
            "expected_gram": None if lineage.perturbed else _rounded(lineage.gram),
            "smallest_distance": lineage.smallest_distance(),
            "mean_distance": lineage.mean_distance(),
            "largest_cosine": lineage.largest_cosine(),
        },
    }


def mixture_record(
    folder: Path,
    name: str,
    form: MixtureFormat,
    settings: Mapping[str, Any],
    num_experts: int,
    num_experts_per_token: int,
) -> dict[str, Any]:
    """Return what the model is: the part of the report that its card begins with.

    Args:
        folder: Has its tokenizer, if it came with one.
        name: What it is called.
        settings: Of the dense architecture that its experts share.
    """
    return {
        "name": name,
        "format": form.name,
        "num_layers": settings["num_hidden_layers"],
        **parameter_counts(form, settings, num_experts, num_experts_per_token),
        "tokenizer": has_tokenizer(folder),
        "chat_template": own_template(folder) is not None,
    }
