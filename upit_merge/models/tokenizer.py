"""Tokenizers: whether a model has one, whose the output gets, and what is in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError, first_line, one_line
from upit_merge.io.sources import DenseModel
from upit_merge.io.untrusted import read_json

LOG = logging.getLogger(__name__)

FAST_FILE = "tokenizer.json"
# Files that are a vocabulary together, the first found is the one that is read: those that the
# tokenizer classes of transformers name, and those that AutoTokenizer converts by itself.
_VOCABULARIES = (
    (FAST_FILE,),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("tekken.json",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tiktoken.model",),
    # A list of words may lie in any folder: a tokenizer's has its settings beside it.
    ("vocab.txt", "tokenizer_config.json"),
)
# Read by some classes only; of the rest AutoTokenizer knows what to do with them.
_OF_ONE_CLASS = ("vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
VOCABULARY_FILES = tuple(dict.fromkeys(chain.from_iterable(_VOCABULARIES)))


def vocabulary_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that a folder's vocabulary is in; () if it has none."""
    kinds = (names for names in _VOCABULARIES if all((folder / name).is_file() for name in names))
    return next(kinds, ())


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder holds a tokenizer's vocabulary, in files that AutoTokenizer reads."""
    return bool(vocabulary_files(folder))


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
            f"tokenizer_source: {donor.label} has no tokenizer that transformers could read "
            "(tokenizer.json, tokenizer.model, or vocab.json and merges.txt); name a model that "
            "has one."
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


def highest_token_id(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the highest id of a tokenizer, or None if it is unusual.

    A `tokenizer.json` is looked into; of other files transformers makes a tokenizer.

    Raises:
        UpitError: there are other files, and transformers cannot read them.
    """
    if (folder / FAST_FILE).is_file():
        try:
            highest = max(_fast_vocabulary(folder).values(), default=None)
        except (UpitError, KeyError, TypeError, AttributeError):
            return None
        return highest if isinstance(highest, int) else None
    try:
        remedy = "check its files, or name another model's with tokenizer_source"
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code, remedy=remedy)
    except UpitError:
        # Sentencepiece's file needs its library, which whoever uses the output may have.
        if vocabulary_files(folder) == ("tokenizer.model",):
            return None
        raise
    return max(tokenizer.get_vocab().values(), default=None)


def check_loads(folder: Path) -> None:
    """Refuse a `tokenizer.json` that the library it is made for cannot load.

    Raises:
        UpitError: naming the folder.
    """
    from tokenizers import Tokenizer

    if not (folder / FAST_FILE).is_file():
        return
    try:
        Tokenizer.from_file(str(folder / FAST_FILE))
    except Exception as error:  # the library raises nothing more special
        raise UpitError(
            f"The tokenizer in {folder} cannot be loaded ({one_line(first_line(error))}); check "
            "its files, or name another model's with tokenizer_source."
        ) from None


def vocabulary(folder: Path) -> Mapping[str, int]:
    """Return a tokenizer's ids by token, the added ones among them; {} if it cannot be read."""
    try:
        if (folder / FAST_FILE).is_file():
            return _fast_vocabulary(folder)
        found: dict[str, int] = load_tokenizer(folder).get_vocab()
        return found
    except (UpitError, KeyError, TypeError, AttributeError):
        return {}


def added_tokens(folder: Path) -> Iterable[str]:
    """Return the tokens that a tokenizer takes out of a text before all else; [] if unknown."""
    try:
        if (folder / FAST_FILE).is_file():
            content = read_json(folder / FAST_FILE, "the tokenizer")
            return [token["content"] for token in content.get("added_tokens", [])]
        return list(load_tokenizer(folder).get_added_vocab())
    except (UpitError, KeyError, TypeError, AttributeError):
        return []


def _fast_vocabulary(folder: Path) -> dict[str, int]:
    content = read_json(folder / FAST_FILE, "the tokenizer")
    tokens = content["model"]["vocab"]
    if not isinstance(tokens, dict):  # Unigram: pairs of token and score
        tokens = {entry[0]: number for number, entry in enumerate(tokens)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**tokens, **added}


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, remedy: str = "check its files"
) -> Any:
    """Return the tokenizer in a local folder, as transformers loads it.

    Args:
        remedy: What to do if it cannot be loaded.

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
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a broken or foreign tokenizer makes the loader raise
        reason = one_line(first_line(error))
        raise UpitError(
            f"The tokenizer in {folder} cannot be loaded ({reason}); {remedy}."
        ) from error
    # A class that finds none of its files makes a tokenizer of nothing.
    kind, (name, *_) = type(tokenizer), vocabulary_files(folder)
    if name in _OF_ONE_CLASS and name not in kind.vocab_files_names.values():
        raise UpitError(
            f"The tokenizer in {folder} cannot be loaded ({kind.__name__} does not read {name}); "
            f"{remedy}."
        )
    return tokenizer
