"""The mixtures of benchmarks.real, made as a user would: by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.real.arms import EXPERTS
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.gates import training_free_gates
from upit_merge.models.mixture import opened_mixture


def recipe(base: Path, checkpoints: Sequence[Path], seed: int, data: Path | None) -> dict[str, Any]:
    """One expert of every checkpoint; of a single one copies, with random gates.

    Args:
        data: For the router, whose temperature and experts per token are chosen on it; None for
            random gates.
    """
    parameters: dict[str, Any] = {"num_experts": EXPERTS, "seed": seed}
    if len(checkpoints) == 1:
        parameters["expansion"] = "copy"
    document: dict[str, Any] = {
        "merge_method": "upit",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in checkpoints],
        "dtype": "bfloat16",
        "parameters": parameters,
    }
    if data is not None:
        document["router"] = {"data": str(data)}
    return document


def merged(
    base: Path, checkpoints: Sequence[Path], out: Path, seed: int, data: Path | None
) -> Path:
    """Run the recipe, unless it has been run; returns the output."""
    document = recipe(base, checkpoints, seed, data)
    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, out, RunOptions(quiet=True))
    return out


def random_gates(moe: Path, seed: int) -> list[Tensor]:
    """Return training-free gates for a mixture, as a recipe without a router has them."""
    with opened_mixture(moe) as source:
        model = LayerwiseMixture(source, torch.device("cpu"))
        layers = model.mixture_layers
        return training_free_gates(model.moe, model.format, layers, model.num_experts, seed)
