"""Mixtures that are published as a part of a larger model: loaded alone, and saved as published.

By their `config.json` transformers would make the towers of the larger model as well, of random
numbers; and it saves them under other names and with other settings than they were read with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upit_merge.io.untrusted import read_json
from upit_merge.models.formats import FUSED, MixtureFormat, found_format

# Of the larger model's names, in the folder.
_NAMES = {r"^model\.language_model\.": "model."}


def load_alone(folder: Path, **options: Any) -> Any | None:
    """Load a mixture that is a part of a larger model; None if the folder holds no such one.

    Args:
        options: Of `from_pretrained`.
    """
    import transformers

    config = read_json(folder / "config.json", "the model")
    form = found_format(config)
    if form is None or not form.is_part:
        return None
    model_class = getattr(transformers, form.class_name)
    return model_class.from_pretrained(
        folder, config=form.read(config), key_mapping=_NAMES, **options
    )


def save_alone(form: MixtureFormat, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Save the weights of such a mixture by their published names, all experts packed.

    Args:
        tensors: By their names in transformers' memory.
    """
    from huggingface_hub import save_torch_state_dict

    kinds = {kind: name for name, kind in form.packed.items()}
    names = {f"{form.experts_path}.{kind}": form.in_block(kinds[kind]) for kind in FUSED}
    stored = {}
    for name, tensor in tensors.items():
        published = name
        for own, packed in names.items():
            if name.endswith(f".{own}"):
                published = name.removesuffix(own) + packed
        stored[form.stored_name(published)] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(stored, folder)
