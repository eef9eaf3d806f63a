"""How mergekit is told of the models that a dense one can be made of, and the recipe of that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from upit_merge.io.hub import is_folder, split_reference
from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import DenseModel
from upit_merge.models.formats import EMBEDDINGS
from upit_merge.models.lora.adapter import Adapter
from upit_merge.models.views import stored_model
from upit_merge.router.worth import Rival

# Without the first option mergekit opens no adapter; without the second it rounds what it adds.
_OF_ADAPTERS = (
    "# Adapters need options: mergekit-yaml RECIPE OUT --lora-merge-cache FOLDER "
    "--lora-merge-dtype float32\n"
    "# FOLDER gets a complete model of every adapter; give one that is empty.\n"
)
_MERGE_FIRST = (
    "so that mergekit-yaml cannot open it; write it as a complete model with PEFT's "
    "merge_and_unload(), and list that."
)


@dataclass(frozen=True)
class MergekitModels:
    """Models as a recipe of mergekit names them.

    Attributes:
        base, checkpoints: Folders or Hub ids, or `BASE+ADAPTER`; of names with a + or @ of their
            own, which mergekit would take apart, the parts.
        adapters: Some of them are adapters.
        unfit: Why mergekit can make nothing of them, in a sentence without anybody's paths.
    """

    base: Any
    checkpoints: Sequence[Any]
    adapters: bool = False
    unfit: str = ""

    @classmethod
    def of(cls, base: DenseModel, checkpoints: Sequence[DenseModel]) -> MergekitModels:
        """Name models that are open."""
        stored = [*map(stored_model, checkpoints)]
        return cls(
            _named(stored_model(base)),
            [*map(_named, stored)],
            any(isinstance(model, Adapter) for model in stored),
            next(filter(None, (_unfit(number, model) for number, model in enumerate(stored))), ""),
        )


def has_recipe(rival: Rival) -> bool:
    """Return whether mergekit would make a rival: of a checkpoint as it is there is nothing to make."""
    return rival.kind in ("average", "sum")


def mergekit_recipe(rival: Rival, models: MergekitModels, dtype: torch.dtype) -> str | None:
    """Return the mergekit recipe that makes a dense rival; None if there is none.

    Args:
        dtype: Of the output; sums are made in float32.
    """
    if not has_recipe(rival) or models.unfit:
        return None
    weight = rival.facts["scale"] if rival.kind == "sum" else 1.0
    entries = [
        {"model": name, "parameters": {"weight": float(weight)}} for name in models.checkpoints
    ]
    document: dict[str, Any] = {"merge_method": "linear", "models": entries}
    if rival.kind == "sum":
        document = {
            "merge_method": "task_arithmetic",
            "base_model": models.base,
            "models": entries,
        }
    document["dtype"] = "float32"
    if dtype != torch.float32:
        document["out_dtype"] = str(dtype).removeprefix("torch.")
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10**6)
    return (_OF_ADAPTERS if models.adapters else "") + text


def _named(model: DenseModel) -> Any:
    whole, adapter = split_reference(model.label)
    if isinstance(model, Adapter) and adapter is None:
        whole, adapter = model.base.label, model.label
    parts = [_path(part) for part in (whole, adapter) if part is not None]
    if not any("+" in part["path"] or "@" in part["path"] for part in parts):
        return "+".join("@".join(part.values()) for part in parts)
    return dict(zip(("model", "lora"), parts, strict=False))


def _path(reference: str) -> dict[str, str]:
    """Return a folder, or what the Hub has, as a part of mergekit's reference."""
    if is_folder(reference):
        return {"path": os.path.expanduser(reference)}  # which mergekit does not do
    name, _, revision = reference.partition("@")
    return {"path": name, **({"revision": revision} if revision else {})}


def _unfit(number: int, model: DenseModel) -> str:
    """Return why mergekit cannot put an adapter on its base, in a sentence; or nothing.

    It merges adapters with PEFT into the base as that is, and takes the base's configuration.
    """
    if not isinstance(model, Adapter):
        return ""
    if model.specs[EMBEDDINGS].shape != model.base.specs[EMBEDDINGS].shape:
        return (
            f"Checkpoint {number} is an adapter with another vocabulary than its base, "
            f"{_MERGE_FIRST}"
        )
    tied, base_tied = (
        bool(language_settings(config).get("tie_word_embeddings"))
        for config in (model.config, model.base.config)
    )
    if tied != base_tied:
        return (
            f"Checkpoint {number} is an adapter whose head is no longer its embeddings, as its "
            f"base's is, {_MERGE_FIRST}"
        )
    return ""
