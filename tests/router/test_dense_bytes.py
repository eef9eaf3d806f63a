"""What a dense model takes on disk beside its mixture: of all formats, with all they may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.conftest import build_family
from tests.support.families import FORMAT_KINDS
from upit_merge.commands.preview import PlannedMixture, dense_models
from upit_merge.config.recipe import parse_recipe
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened
from upit_merge.models.formats import FORMATS
from upit_merge.router.evaluation import dense_bytes, disk_bytes

KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    **FORMAT_KINDS,
    "mixtral": ("llama", "mixtral", {}, {}),
    "mixtral, tied": ("llama", "mixtral", {"tie_word_embeddings": True}, {}),
    "qwen3_moe": ("qwen3", "qwen3_moe", {"head_dim": 8}, {}),
}


def stored_bytes(folder: Path) -> int:
    """Of all tensors in a folder's file; those of tied tables are there once."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_all_formats_are_here() -> None:
    assert {architecture for _kind, architecture, *_ in KINDS.values()} == FORMATS.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_a_dense_model_takes_what_the_base_takes(name: str, dtype: str, tmp_path: Path) -> None:
    kind, architecture, settings, parameters = KINDS[name]
    family = build_family(tmp_path, kind=kind, count=3, **settings)
    recipe = family.recipe(architecture=architecture, parameters=parameters, dtype=dtype)
    expected = stored_bytes(family.base) * getattr(torch, dtype).itemsize // 4
    with opened(parse_recipe(recipe), OpenOptions()) as inputs:
        model = LayerwiseMixture(PlannedMixture(inputs), torch.device("cpu"))
        assert dense_bytes(model) == expected
        assert dense_models(inputs).num_bytes == expected
        assert disk_bytes(model)[0] > expected
