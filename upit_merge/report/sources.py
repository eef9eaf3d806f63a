"""What the report says of the models a mixture is made of: names, Hub ids, their own cards."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from upit_merge.io.hub import looks_like_path, split_reference
from upit_merge.io.sources import DenseModel

# Of a card's metadata block, which is at its very beginning. `huggingface_hub.metadata_load` did
# not see it behind a byte order mark, and read in the system's encoding, as late as 1.5.0.
_METADATA = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_MOST_CHARACTERS = 300  # of a text that is taken over from somebody's card


class Source(BaseModel):
    """Describes one model a mixture is made of, as others know it.

    Attributes:
        name: Short, and told apart from the other checkpoints'.
        hub_ids: What it is on the Hugging Face Hub; an adapter's base comes first.
        license, license_name, license_link, language: Of its own card.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    hub_ids: list[str] = []
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = []


def describe_sources(models: Sequence[DenseModel]) -> list[dict[str, Any]]:
    """Return a `Source` for every model, as plain data for the report."""
    names = told_apart([model.label for model in models])
    return [_source(m, name).model_dump() for m, name in zip(models, names, strict=True)]


def _source(model: DenseModel, name: str) -> Source:
    return Source(name=name, hub_ids=_hub_ids(model.label), **card_metadata(model.folder))


def _hub_ids(label: str) -> list[str]:
    """Return the ids of the models a reference names: local folders mean nothing to other people."""
    ids = []
    for reference in filter(None, split_reference(label)):
        local = looks_like_path(reference) or Path(os.path.expanduser(reference)).is_dir()
        name = _id_of_cached(reference) if local else reference.partition("@")[0]
        if name and is_hub_id(name):
            ids.append(name)
    return ids


def is_same_model(model: DenseModel, label: object) -> bool:
    """Return whether a label of some report certainly names this model: by its folder, or the Hub's."""
    if not isinstance(label, str) or split_reference(model.label)[1] is not None:
        return False
    folder = os.path.realpath(os.path.expanduser(label))
    if model.label == label or folder == os.path.realpath(model.folder):
        return True
    return bool({*_hub_ids(model.label)} & {*_hub_ids(label)})


def _id_of_cached(folder: str) -> str | None:
    """Return the id of a folder inside the Hub's cache, `models--owner--name/snapshots/REVISION`."""
    parts = Path(os.path.abspath(os.path.expanduser(folder))).parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/")


def is_hub_id(name: str) -> bool:
    """Tell whether the Hub could have a model of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return what the card in a model's folder says of licence and language, if it has one."""
    try:
        found = _METADATA.match((folder / "README.md").read_text(encoding="utf-8-sig"))
        metadata = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # ValueError: 30 February
        return {}
    if not isinstance(metadata, dict):
        return {}
    languages = metadata.get("language")
    texts = {key: _text(metadata.get(key)) for key in ("license", "license_name", "license_link")}
    listed = languages if isinstance(languages, list) else [languages]
    return {**texts, "language": [text for item in listed if (text := _language(item))]}


def _text(value: Any) -> str | None:
    """Return a text, or the only one in a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip() or len(value) > _MOST_CHARACTERS:
        return None
    return " ".join(value.split())


def _language(value: Any) -> str | None:
    # YAML takes the code of Norwegian for a truth value.
    return "no" if value is False else _text(value)


def told_apart(labels: Sequence[str]) -> list[str]:
    """Return short labels; with the folder they are in where several would be the same."""
    short = [short_label(label) for label in labels]
    return [
        "/".join(Path(label).parts[-2:]) if short.count(name) > 1 else name
        for label, name in zip(labels, short, strict=True)
    ]


def short_label(label: str) -> str:
    """Return what a model is called; of a local path, which is of somebody's disk, the last part.

    Of `BASE+ADAPTER` the adapter tells the experts apart.
    """
    label = split_reference(label)[1] or label
    if not (looks_like_path(label) or Path(label).is_dir()):
        return label
    return _id_of_cached(label) or Path(os.path.abspath(os.path.expanduser(label))).name
