"""What an output has of a tokenizer and of generation settings, for every reader of models."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import DenseModel
from upit_merge.io.untrusted import TEMPLATE_FOLDER, read_json
from upit_merge.models.chat_template import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    template_files,
    tokenizer_config,
    write_loosely,
)
from upit_merge.models.tokenizer import (
    FAST_FILE,
    VOCABULARY_FILES,
    highest_token_id,
    load_tokenizer,
)

LOG = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
_OTHER_FILES = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
)
# Classes that only transformers 5 has, and which it takes the old one for.
_CLASSES_OF_5 = ("TokenizersBackend", "PythonBackend")
_FAST_CLASS = "PreTrainedTokenizerFast"
# How a tokenizer was loaded, which transformers 5 saves with it.
_LOADER_ARGUMENTS = ("backend", "is_local", "local_files_only")
# Classes of transformers 4 that put a start token before every text unless told otherwise, whatever
# `tokenizer.json` says; transformers 5 does as that says, and does not save whether.
_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")


def copy_tokenizer_files(donor: DenseModel, folder: Path) -> None:
    """Copy the donor's tokenizer and chat templates, so that transformers 4 reads them as 5 does.

    If it has no `tokenizer.json`, one is made of what transformers reads. Not all programs read
    the others; and transformers 5 reads a `tokenizer.model` in one way in a Mixtral's folder and in
    another in a Llama's.
    """
    for name in dict.fromkeys((*VOCABULARY_FILES, *_OTHER_FILES)):
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, folder / name)
    for path in template_files(donor.folder):
        (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATE_FOLDER / path.name)
    if not (folder / FAST_FILE).is_file():
        _convert(donor, folder)
    make_readable(folder)


def add_wanted_tokens(folder: Path, tokens: Sequence[str], vocab_size: int) -> None:
    """Give a `tokenizer.json` tokens that some reader of the format looks for, if it lacks them.

    They get ids that embeddings are there for and no token has: the text they are is read as one of
    them from then on, all other text as before.

    Args:
        tokens: What is looked for.
        vocab_size: How many embeddings there are.
    """
    if not tokens:
        return
    path = folder / FAST_FILE
    content = _readable_json(path) if path.is_file() else {}
    added, model = content.get("added_tokens"), content.get("model")
    known = {entry["content"] for entry in added} if isinstance(added, list) else set()
    missing = [token for token in tokens if token not in known]
    if not missing:
        return
    first = 1 + (highest_token_id(folder) or 0)
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    free = vocab_size - first
    if not isinstance(added, list) or not isinstance(vocabulary, dict) or free < len(missing):
        LOG.warning(
            "llama.cpp's converter looks for the tokens %s, for which the tokenizer has no room; "
            "it will refuse the output, other programs will not.",
            ", ".join(missing),
        )
        return
    for token in missing:
        number = vocabulary.get(token)
        entry = {"id": first if number is None else number, "content": token, "special": True}
        first += number is None
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({**entry, **flags})
    content["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    write_loosely(path, content)


def _convert(donor: DenseModel, folder: Path) -> None:
    try:
        tokenizer = load_tokenizer(donor.folder)
        backend = tokenizer.backend_tokenizer
    except (UpitError, AttributeError):  # tokenizers in Python, or of mistral-common, have none
        LOG.warning(
            "No %s can be made of the tokenizer of %s; its files are copied as they are.",
            FAST_FILE,
            donor.label,
        )
        return
    backend.save(str(folder / FAST_FILE))


def make_readable(folder: Path) -> None:
    """Rewrite the settings of a tokenizer of transformers 5 that transformers 4 cannot read.

    Token ids stay the same in both. Files that need no change are not written, nor are those of a
    tokenizer that only transformers 5 has code for.
    """
    before = tokenizer_config(folder)
    after = _old_names(before)
    is_fast = (folder / FAST_FILE).is_file()
    if is_fast and after.get("tokenizer_class") in _CLASSES_OF_5:
        after["tokenizer_class"] = _FAST_CLASS
    if is_fast and str(after.get("tokenizer_class")).removesuffix("Fast") in _ADD_BOS:
        after = _with_start_and_end(after, folder / FAST_FILE)
    if after != before:
        write_loosely(folder / CONFIG_FILE, after)
    path = folder / "special_tokens_map.json"
    if path.is_file():
        tokens = _readable_json(path)
        if tokens and (renamed := _old_names(tokens)) != tokens:
            write_loosely(path, renamed)


def _old_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with a list of further special tokens under its old name."""
    result = {name: value for name, value in settings.items() if name not in _LOADER_ARGUMENTS}
    further = result.get("extra_special_tokens")
    if not isinstance(further, list):
        return result
    known = result.pop("additional_special_tokens", None) or []
    further = [*known, *(token for token in further if token not in known)]
    return {
        "additional_special_tokens" if name == "extra_special_tokens" else name: (
            further if name == "extra_special_tokens" else value
        )
        for name, value in result.items()
    }


def _with_start_and_end(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return settings that say which tokens `tokenizer.json` puts around a text."""
    from tokenizers import Tokenizer

    try:
        tokens = Tokenizer.from_file(str(path)).encode("a").tokens
    except Exception:  # the library raises nothing more special; nobody will read the file
        return settings
    # A token may be written with how it is matched.
    names = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key in ("bos_token", "eos_token")
        if (value := settings.get(key))
    }
    found = {
        "add_bos_token": names.get("bos_token") in tokens[:1],
        "add_eos_token": names.get("eos_token") in tokens[-1:],
    }
    assumed = {"add_bos_token": True, "add_eos_token": False}
    told = {key: value for key, value in found.items() if value != assumed[key]}
    return settings | {key: value for key, value in told.items() if key not in settings}


def copy_generation_config(donor: DenseModel, others: Sequence[DenseModel], folder: Path) -> None:
    """Copy the donor's generation settings, or another model's with the donor's special tokens.

    Trainers leave `use_cache: false`, which makes generating slow: it becomes true.

    Args:
        others: Who is asked if the donor has none, in this order.
    """
    owner = next(
        (model for model in (donor, *others) if model.small_file(GENERATION_FILE).is_file()), None
    )
    if owner is None:
        return
    path = owner.small_file(GENERATION_FILE)
    before = _readable_json(path)
    after = dict(before)
    if after.get("use_cache") is False:
        after["use_cache"] = True
    if owner is not donor:
        LOG.warning(
            "%s has no %s; the output gets that of %s.", donor.label, GENERATION_FILE, owner.label
        )
        after = _with_tokens_of(language_settings(donor.config), after)
    if after == before:
        shutil.copyfile(path, folder / GENERATION_FILE)
    else:
        write_loosely(folder / GENERATION_FILE, after)


def _with_tokens_of(config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return generation settings that end where the model with this configuration ends."""
    own, theirs = (_ids(source.get("eos_token_id")) for source in (config, settings))
    if any(number not in theirs for number in own):
        ends = [*own, *(number for number in theirs if number not in own)]
        settings = settings | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    for field in ("bos_token_id", "pad_token_id"):
        if field in settings and config.get(field) is not None:
            settings = settings | {field: config[field]}
    return settings


def _ids(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if number is not None]


def _readable_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} for what is none: nobody who reads models minds."""
    try:
        return read_json(path, "the model")
    except UpitError:
        return {}
