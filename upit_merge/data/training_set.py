"""Examples as a trainer takes them: a table of the `datasets` library, on the disk, for TRL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upit_merge import __version__
from upit_merge.data.examples import iter_examples, load_hub, local_data
from upit_merge.data.records import SeedExample
from upit_merge.data.tokens import readings, with_known_calls
from upit_merge.errors import UpitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)

# What a table is of, by the columns it has besides `tools` and `chat_template_kwargs`.
_KINDS = {
    "text": "a text",
    "messages": "a conversation",
    "pair": "a prompt with its completion",
    "chat pair": "a prompt with its completion, as messages",
}

# What reads a file of token ids, by its ending, in the words of the datasets library.
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def training_set(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    config: str | None = None,
    text: str = "text",
    other_template: bool = False,
) -> Any:
    """Return all examples of a file, folder or Hub dataset as a `datasets.Dataset`.

    They are read twice: once to find what is wrong with any of them, once into a file of the
    `datasets` library's cache, which is mapped into memory. The columns are TRL's: `text`,
    `messages`, or `prompt` and `completion`.

    Args:
        source, split, config: As `read_seed_data` takes them.
        text: Which column is the text, and is called so in the table.
        other_template: The tokenizer will be given another chat template.

    Raises:
        UpitError: as `read_seed_data`, or the examples are not all of one kind.
    """
    from datasets import Dataset, Features, List, Value

    from upit_merge.data.exact_json import ExactJson

    has_template = other_template or bool(tokenizer.chat_template)
    options: dict[str, Any] = {"split": split, "config": config, "text": text}
    first, first_kind = "", ""
    besides: dict[str, None] = {}
    found: dict[str, None] = {}
    examples = iter_examples(source, **options)
    if not other_template:
        examples = with_known_calls(examples, tokenizer)
    for example in examples:
        kind = _kind(example, has_template=has_template)
        if kind in ("messages", "chat pair") and not has_template:
            raise UpitError(
                f"{example.source} is a conversation, but the tokenizer has no chat template; use "
                "a `text` column, or set chat_template_path."
            )
        first, first_kind = first or example.source, first_kind or kind
        if kind != first_kind:
            raise UpitError(
                f"{first} is {_KINDS[first_kind]}, but {example.source} is {_KINDS[kind]}, and a "
                "model is trained on one of them at a time; make them alike, or files of their own."
            )
        besides |= dict.fromkeys(_besides(example))
        found |= dict.fromkeys(readings([example], has_template=has_template))
    for reading in found:
        LOG.info("Training data: %s.", reading)
    one: Any = List(ExactJson()) if first_kind in ("messages", "chat pair") else Value("string")
    names = {"text": [text], "messages": ["messages"]}.get(first_kind, ["prompt", "completion"])
    features = dict.fromkeys(names, one) | dict.fromkeys(besides, ExactJson())
    return Dataset.from_generator(
        _rows,
        features=Features(features),
        gen_kwargs={
            "source": source,
            "options": options,
            "has_template": has_template,
            "columns": tuple(features),
            # What is cached is told apart by these arguments.
            "state": _state(source, split, config),
            "version": __version__,
        },
    )


def _rows(
    source: str, options: dict[str, Any], has_template: bool, columns: tuple[str, ...], **_: Any
) -> Iterator[dict[str, Any]]:
    for example in iter_examples(source, **options):
        row: dict[str, Any] = dict.fromkeys(columns)
        if "chat_template_kwargs" in row:
            row["chat_template_kwargs"] = {}
        row |= _besides(example)
        if example.plain and example.is_plain(has_template=has_template):
            row["prompt"], row["completion"] = example.plain
        elif example.messages is not None:
            row["messages"] = example.messages
        elif example.text is not None:
            row[options["text"]] = example.text
        else:
            row["prompt"], row["completion"] = example.prompt, example.completion
        yield row


def _kind(example: SeedExample, *, has_template: bool) -> str:
    if example.messages is not None:
        return "messages"
    if example.text is not None:
        return "text"
    is_plain = example.is_plain(has_template=has_template) or isinstance(example.prompt, str)
    return "pair" if is_plain else "chat pair"


def _besides(example: SeedExample) -> dict[str, Any]:
    """Return what the chat template is given besides, by TRL's names."""
    found = {"tools": example.tools, "chat_template_kwargs": example.template_options}
    return {name: value for name, value in found.items() if value is not None}


def _state(source: str, split: str, config: str | None) -> Any:
    """Return what changes when the data does."""
    path = local_data(source)
    if path is None:
        return str(load_hub(source, split, config)._fingerprint)
    files = [*path.iterdir()] if path.is_dir() else [path]
    stats = {str(file): file.stat() for file in sorted(map(Path.absolute, files))}
    # No list: that would be taken for shards, to be read one by one.
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def tokenized_set(source: str) -> Any:
    """Return a file's table if its records are token ids (`input_ids`), which only trainers read.

    Returns:
        A `datasets.Dataset` with all its columns; None if the data is anything else.
    """
    from datasets import load_dataset

    path = local_data(source)
    reader = _READERS.get(path.suffix.lower()) if path is not None and path.is_file() else None
    if reader is None:
        return None
    try:
        rows = load_dataset(reader, data_files=str(path), split="train", streaming=True)
        if "input_ids" not in next(iter(rows), {}):
            return None
        return load_dataset(reader, data_files=str(path), split="train")
    except Exception:  # who reads it as anything else says what is wrong with it
        return None
