"""Names of a model's tensors, for the names that other programs have left in its files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.io.language_part import language_name, language_settings
from upit_merge.io.tensor_file import TensorSpec

# What torch.compile, DDP, FSDP and activation checkpointing put before the names in a module that
# they have wrapped.
_WRAPPED = re.compile(
    r"(?<![^.])(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
_OF_PEFT = "base_model.model."
_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
_LANGUAGE_PART = "language_model."


def plain_name(name: str) -> str:
    """Return a tensor's name without what torch's wrappers have put into it."""
    return _WRAPPED.sub("", name)


def stored_names(label: str, names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return by which name each tensor of a model is stored, by the name it has in transformers.

    * Of a model that torch.compile, DDP or FSDP had wrapped, `_orig_mod.` and the like are left out.
    * What `AutoModel` has saved is a model without its head: `model.` comes before its names.
    * A tied model may have its one table as `lm_head.weight` only.
    * A model of text and images has `language_model.` in those of its language model.

    Raises:
        UpitError: two tensors would have one name, or the names are of another model's part.
    """
    stored: dict[str, str] = {}
    for name in names:
        if name.startswith(_OF_PEFT):
            raise UpitError(
                f"Checkpoint {label} has the tensor {name}, as PEFT's models have; save it again "
                "after merge_and_unload, or save the adapter alone with save_pretrained."
            )
        plain = language_name(plain_name(name), config)
        if plain in stored:
            raise UpitError(
                f"Checkpoint {label} has {stored[plain]} and {name}, which are one tensor; save "
                "the model again, or remove one of them."
            )
        stored[plain] = name
    if _EMBEDDINGS in stored and not any(name.startswith("model.") for name in stored):
        heads = {_HEAD} & stored.keys()
        stored = {n if n in heads else f"model.{n}": old for n, old in stored.items()}
    embeddings = f"model.{_EMBEDDINGS}"
    if embeddings not in stored:
        if language_settings(config).get("tie_word_embeddings") is True and _HEAD in stored:
            stored[embeddings] = stored.pop(_HEAD)
        elif part := next((name for name in stored if _LANGUAGE_PART in name), None):
            raise UpitError(
                f"Checkpoint {label} has the tensor {part}, as models of text and images have; "
                "save its language model alone with save_pretrained, and give that."
            )
    return stored


def check_gathered(label: str, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse what DeepSpeed's ZeRO-3 leaves in the place of tensors that are on other devices.

    Raises:
        UpitError: a tensor has no values.
    """
    empty = next((name for name, spec in specs.items() if spec.shape == (0,)), None)
    if empty is None:
        return
    remedy = "save it again with stage3_gather_16bit_weights_on_model_save: true"
    if (folder / "zero_to_fp32.py").is_file():
        remedy = (
            f"run DeepSpeed's own `python -m deepspeed.utils.zero_to_fp32 {folder} OUT "
            "--safe_serialization`, and give OUT with the other files of this folder"
        )
    raise UpitError(
        f"Checkpoint {label} has {empty} without values, as DeepSpeed ZeRO-3 saves what it has not "
        f"gathered; {remedy}."
    )
