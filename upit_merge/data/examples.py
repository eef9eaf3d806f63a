"""Seed data for the router: files or a Hub dataset -> raw examples -> a sample -> token ids.

Two steps: `read_seed_data`, `sample_examples`; `seed_tokens` turns the result into token ids.
Every mistake in the data is an `UpitError` that names the file and the line, record or row.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from textwrap import shorten
from typing import Any

from upit_merge.errors import UpitError, first_line

# The paper trains its router on 500 to 5,000 samples, about 1 % of the instruction-tuning set.
DEFAULT_SAMPLES = 1000

COLUMNS = ("messages", "prompt", "completion", "text")
EXTENSIONS = (".jsonl", ".json", ".parquet", ".txt")
_FILES = ".jsonl, .json, .parquet or .txt"
_COLUMN_REMEDY = (
    "give each record `text`, `messages` (a list of {role, content}) or `prompt` and `completion`"
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class SeedExample:
    """One raw record: `text`, or `messages`, or `prompt` with `completion`; the rest is None.

    `prompt` and `completion` are both strings or both lists of messages. `source` says where the
    record came from, for error messages: "seed.jsonl line 17". `label` is the value of the column
    that was asked for, such as the sample's domain.
    """

    source: str
    text: str | None = None
    messages: Messages | None = None
    prompt: str | Messages | None = None
    completion: str | Messages | None = None
    label: str | int | None = None


# ---- reading -------------------------------------------------------------------------------


def read_seed_data(
    source: str, *, split: str = "train", config: str | None = None, column: str | None = None
) -> list[SeedExample]:
    """Read every record of a file, of a folder's files (in sorted order), or of a Hub dataset.

    Args:
        source: a `.jsonl` or `.json` file (an object on each line, or one list of objects),
            a `.parquet` file, a `.txt` file (blank lines separate the samples; without any, line
            ends do), a folder of such files (other files and subfolders are passed over), or a
            dataset id.
        split, config: of the dataset id, which may end in `@revision`; files have none.
        column: A further column, whose value becomes every example's `label`.

    Raises:
        UpitError: nothing there, an unknown extension, an empty or malformed file, or a record
            without usable columns or without the column asked for.
    """
    path = Path(os.path.expanduser(source))
    if source and os.path.exists(path):
        return _read_path(path, column)
    if source[:1] in ("", "/", ".", "~") or path.suffix.lower() in EXTENSIONS:
        raise UpitError(
            f"There is no seed data at {source!r}; give the path of a {_FILES} file or of a "
            "folder of them, or a dataset id."
        )
    return _read_hub(source, split, config, column)


def _read_path(path: Path, column: str | None) -> list[SeedExample]:
    try:
        if not path.is_dir():
            return _read_file(path, column)
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in EXTENSIONS]
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise UpitError(f"The folder {path} holds no {_FILES} file; put the seed data there.")
        return [example for file in files for example in _read_file(file, column)]
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise UpitError(f"{where} cannot be read ({why}); check the file's rights.") from error


def _read_file(path: Path, column: str | None) -> list[SeedExample]:
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        kind = f"the extension {suffix}" if suffix else "no extension"
        raise UpitError(f"{path} has {kind}; give seed data as a {_FILES} file.")
    if suffix == ".parquet":
        records = _parquet_records(path, column)
    else:
        records = _text_records(path) if suffix == ".txt" else _json_records(path)
    examples = [_to_example(record, source, column) for source, record in records]
    if not examples:
        raise UpitError(f"{path} is empty; put at least one sample in it.")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Bytes, for their lines end at \n only: JSON strings may hold U+2028 and its kind unescaped.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UpitError(
                    f"{path} line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at "
                    f"column {error.start + 1}); save the file as UTF-8."
                ) from error


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    lines = list(_lines(path))
    first = next((line for _, line in lines if line.strip()), "")
    if first.lstrip().startswith("["):  # one list of objects, over any number of lines
        records = _parse(path, 1, "\n".join(line for _, line in lines))
        yield from ((f"{path} record {index}", record) for index, record in enumerate(records, 1))
        return
    for number, line in lines:
        if line.strip():
            yield f"{path} line {number}", _parse(path, number, line)


def _parse(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        line, found = first_line, str(error)
    raise UpitError(f"{path} line {line} is not JSON ({found}); put one JSON object on each line.")


def _text_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Blocks between blank lines; every line is one where a file has no blank lines to speak of."""
    groups = groupby(_lines(path), key=lambda item: not item[1].strip())
    blocks = [list(group) for blank, group in groups if not blank]
    if len(blocks) == 1:
        blocks = [[line] for line in blocks[0]]
    for block in blocks:
        yield f"{path} line {block[0][0]}", {"text": "\n".join(line for _, line in block)}


def _parquet_records(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _usable(file.schema_arrow.names, f"{path}", column)
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=columns))
            for row, record in enumerate(chain.from_iterable(batches), 1):
                yield f"{path} row {row}", record
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
        why = first_line(error)
        raise UpitError(f"{path} is not readable parquet ({why}); write it again.") from error


def _read_hub(name: str, split: str, config: str | None, column: str | None) -> list[SeedExample]:
    import datasets

    try:
        repo, _, revision = name.partition("@")
        dataset = datasets.load_dataset(repo, config, split=split, revision=revision or None)
    except Exception as error:  # the Hub's client and the builders raise all kinds
        remedy = f"check the dataset's id, its config and that it has the split {split!r}"
        if isinstance(error, ConnectionError):
            remedy = "load the dataset once while online, so that it is in the local cache"
        raise UpitError(
            f"{name!r} is no file or folder here, and could not be loaded as a dataset from the "
            f"Hub ({first_line(error)}); give the path of a {_FILES} file, or {remedy}."
        ) from error
    columns = _usable(dataset.column_names, f"The dataset {name}", column)
    rows = enumerate(dataset.select_columns(columns), 1)
    examples = [_to_example(record, f"{name} {split} row {row}", column) for row, record in rows]
    if not examples:
        raise UpitError(f"The dataset {name} has no rows in {split!r}; choose another split.")
    return examples


# ---- records -------------------------------------------------------------------------------


def _to_example(record: Any, source: str, column: str | None) -> SeedExample:
    if not isinstance(record, dict):
        raise UpitError(f"{source} is {_kind(record)}, not a JSON object; {_COLUMN_REMEDY}.")
    label = None if column is None else _label(record, column, source)
    # Tables have every column in every row, so an absent value arrives as None.
    found = {name: record[name] for name in COLUMNS if record.get(name) is not None}
    if "messages" in found:
        messages = _messages(found["messages"], "messages", source)
        return SeedExample(source, messages=messages, label=label)
    if "prompt" in found and "completion" in found:
        prompt, completion = found["prompt"], found["completion"]
        if isinstance(prompt, list) != isinstance(completion, list):
            raise UpitError(
                f"{source} has {_kind(prompt)} as `prompt` and {_kind(completion)} as "
                "`completion`; make both strings, or both lists of {role, content}."
            )
        for name in ("prompt", "completion"):
            if isinstance(prompt, list):
                _messages(found[name], name, source)
            else:
                _check_string(found[name], f"`{name}`", source)
        return SeedExample(source, prompt=prompt, completion=completion, label=label)
    if "text" in found:
        _check_string(found["text"], "`text`", source)
        return SeedExample(source, text=found["text"], label=label)
    raise _no_usable_column(source, [name for name in record if record[name] is not None])


def _label(record: dict[str, Any], column: str, source: str) -> str | int:
    value = record.get(column)
    if isinstance(value, str) or type(value) is int:
        return value
    if value is None:
        names = [name for name in record if record[name] is not None and name != column]
        raise _no_such_column(source, column, names)
    raise UpitError(
        f"{source} has {_kind(value)} in the column `{column}`; make it a text or a whole number."
    )


def _messages(value: Any, column: str, source: str) -> Messages:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else _kind(value)
        raise UpitError(f"{source} has {kind} as `{column}`; make it a list of {{role, content}}.")
    for index, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UpitError(
                f"{source} has {_kind(message)} as message {index} of `{column}`; make it an "
                "object with `role` and `content`."
            )
        for key in ("role", "content"):
            _check_string(message.get(key), f"`{key}` of message {index} of `{column}`", source)
    return value


def _check_string(value: Any, what: str, source: str) -> None:
    found = _kind(value)
    if isinstance(value, str):
        try:
            value.encode("utf-8")  # a lone "\\ud83d" is valid JSON, but no tokenizer takes it
            return
        except UnicodeEncodeError:
            found = "a broken string (half of a surrogate pair)"
    raise UpitError(f"{source} has {found} as {what}; make it a valid string.")


def _usable(names: Sequence[str], where: str, column: str | None) -> list[str]:
    """The columns to read (a table's others may be large), or the error that one is missing."""
    columns = [name for name in COLUMNS if name in names]
    if not columns:
        raise _no_usable_column(where, names)
    if column is not None and column not in names:
        raise _no_such_column(where, column, names)
    return columns if column is None or column in columns else [*columns, column]


def _no_such_column(where: str, column: str, names: Sequence[str]) -> UpitError:
    found = shorten(", ".join(f"`{name}`" for name in names) or "nothing", 200)
    return UpitError(f"{where} has no column `{column}` (it has {found}); name one that is there.")


def _no_usable_column(where: str, names: Sequence[str]) -> UpitError:
    found = shorten(", ".join(f"`{name}`" for name in names) or "nothing", 200)
    return UpitError(f"{where} has {found} and no usable column; {_COLUMN_REMEDY}.")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", bytes: "binary data", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def sample_examples(
    examples: Sequence[SeedExample], sample: float | int | None, seed: int
) -> list[SeedExample]:
    """Choose examples at random, the same for the same seed, and keep them in order.

    Args:
        sample: a float in (0, 1] is a fraction (at least one example is taken), an int a count
            (all, if there are fewer), None means at most `DEFAULT_SAMPLES`.
    """
    if sample is None:
        count = DEFAULT_SAMPLES
    elif type(sample) is int and sample >= 1:
        count = sample
    elif type(sample) is float and 0 < sample <= 1:
        count = max(1, round(sample * len(examples)))
    else:
        raise UpitError(
            f"`sample` is {sample!r}; give a fraction above 0.0 and up to 1.0, or a whole number "
            "of samples from 1."
        )
    chosen = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    return [examples[index] for index in sorted(chosen)]
