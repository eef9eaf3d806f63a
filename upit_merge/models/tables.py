"""Embeddings and head: one table or two, whatever a configuration says of them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.language_part import language_settings
from upit_merge.io.tensor_file import equal_tensors
from upit_merge.models.formats import EMBEDDINGS, HEAD

Kind = TypeVar("Kind", bound=Checkpoint)


def open_checkpoint(label: str, folder: Path, options: OpenOptions) -> Checkpoint:
    """Open a complete dense model, with its head if it has one of its own.

    Raises:
        UpitError: as `Checkpoint`.
    """
    return with_own_head(Checkpoint(label, folder, options))


def with_own_head(model: Kind) -> Kind:
    """Return a model that is open; where its head is not its embeddings, its configuration says so.

    A LoRA adapter that has trained both tables (`modules_to_save`), once merged, leaves two of them
    and `tie_word_embeddings: true`. transformers 5 keeps both, and so does what is made of them.

    Raises:
        UpitError: it cannot be read, and is closed.
    """
    try:
        if language_settings(model.config).get("tie_word_embeddings", False) and _are_two(model):
            model.config = {**model.config, "tie_word_embeddings": False}
            model.is_falsely_tied = True
    except BaseException:
        model.close()
        raise
    return model


def _are_two(model: Checkpoint) -> bool:
    """Return whether there is a head that differs from the embeddings."""
    if not {EMBEDDINGS, HEAD} <= model.specs.keys():
        return False
    return not equal_tensors(model, EMBEDDINGS, HEAD)
