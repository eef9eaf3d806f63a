"""The output's tokenizer, chat template and generation settings."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError, first_line, one_line, shown
from upit_merge.io.sources import DenseModel
from upit_merge.io.untrusted import read_json

LOG = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_GENERATION_FILE = "generation_config.json"


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def tokenizer_donor(
    source: str | None, base: DenseModel, checkpoints: Sequence[DenseModel]
) -> DenseModel | None:
    """Return the model whose tokenizer the output gets.

    Fine-tuning adds chat templates and end tokens: the last checkpoint that has a tokenizer, and
    only then the base.

    Args:
        source: The recipe's `tokenizer_source`: `base`, the label of a model, or None.

    Returns:
        None if no model has a tokenizer.

    Raises:
        UpitError: the model asked for is not in the recipe or has no tokenizer.
    """
    if source is None:
        candidates = (*reversed(checkpoints), base)
        return next((model for model in candidates if has_tokenizer(model.folder)), None)
    donor = base if source == "base" else find_model(source, "tokenizer_source", checkpoints, base)
    if not has_tokenizer(donor.folder):
        raise UpitError(
            f"tokenizer_source: {donor.label} has no tokenizer.json or tokenizer.model; name a "
            "model that has one."
        )
    return donor


def find_model(
    label: str, key: str, checkpoints: Sequence[DenseModel], base: DenseModel
) -> DenseModel:
    """Return the model of the recipe with this label, also by its folder.

    Raises:
        UpitError: naming the recipe's key and the labels there are.
    """
    for model in (*checkpoints, base):
        named = Path(os.path.expanduser(label)).absolute()
        if label == model.label or named == model.folder.absolute():
            return model
    known = ", ".join(model.label for model in checkpoints)
    raise UpitError(f"{key}: {label} is none of the recipe's models ({known}); name one of them.")


def copy_tokenizer_files(donor: DenseModel, folder: Path) -> None:
    """Copy the donor's tokenizer and chat template files."""
    for name in _TOKENIZER_FILES:
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, folder / name)


def copy_generation_config(donor: DenseModel, folder: Path) -> None:
    """Copy the donor's generation settings, if it has any."""
    if (path := donor.small_file(_GENERATION_FILE)).is_file():
        shutil.copyfile(path, folder / _GENERATION_FILE)


def resolve_chat_template(setting: str, models: Sequence[DenseModel]) -> str | None:
    """Return the Jinja text a recipe's `chat_template` means.

    Args:
        setting: A template, the name of one that mergekit ships, or `auto`: the one most of the
            models have.

    Raises:
        UpitError: it is neither.
    """
    if "{" in setting:
        return setting
    if setting == "auto":
        found = [text for model in models if (text := own_template(model.folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    shipped = resources.files("mergekit._data.chat_templates")
    names = sorted(p.name.removesuffix(".jinja") for p in shipped.iterdir() if ".jinja" in p.name)
    if setting not in names:
        raise UpitError(
            f"chat_template: {shown(setting)} is neither a Jinja template nor one of mergekit's "
            f"({', '.join(names)}); use one of these."
        )
    return shipped.joinpath(f"{setting}.jinja").read_text(encoding="utf-8")


def own_template(folder: Path) -> str | None:
    """Return the chat template in a model's folder, if it has exactly one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = _tokenizer_config(folder).get("chat_template")
    return template if isinstance(template, str) else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "tokenizer_config.json", "the tokenizer")
    except UpitError:
        return {}


def write_chat_template(template: str, folder: Path) -> None:
    """Make `template` the one and only chat template of the tokenizer in `folder`.

    It goes where transformers 5 looks (`chat_template.jinja`) and where older readers and
    llama.cpp do (`tokenizer_config.json`).
    """
    # JSON may hold half a character, which UTF-8 cannot; in JSON it can be escaped again.
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", errors="replace")
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = _tokenizer_config(folder) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="backslashreplace",
    )


def highest_token_id(folder: Path) -> int | None:
    """The highest id in `tokenizer.json`, or None if there is no such file or it is unusual."""
    try:
        content = read_json(folder / "tokenizer.json", "the tokenizer")
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in content.get("added_tokens", []))
        highest = max(chain(ids, added), default=None)
        return highest if isinstance(highest, int) else None
    except (UpitError, KeyError, TypeError, AttributeError):
        return None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in a local folder, as transformers loads it.

    Raises:
        UpitError: there is none, or it cannot be loaded.
    """
    if not has_tokenizer(folder):
        raise UpitError(
            f"There is no tokenizer in {folder}, which the router's seed data needs; put "
            "tokenizer.json or tokenizer.model there."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a broken or foreign tokenizer makes the loader raise
        reason = one_line(first_line(error))
        raise UpitError(
            f"The tokenizer in {folder} cannot be loaded ({reason}); check its files."
        ) from error
