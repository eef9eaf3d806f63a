"""Data of samples: files or a Hub dataset -> raw examples -> a sample of them.

The router's seed data and what models are trained on are read alike. `read_seed_data` and
`sample_examples` give examples, which `data/tokens.py` turns into token ids and
`data/training_set.py` into what a trainer takes. Every mistake in the data is an `UpitError` that
names the file and the line, record or row.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from upit_merge.data.records import SeedExample, to_example, usable_columns
from upit_merge.errors import UpitError, first_line

# The paper trains its router on 500 to 5,000 samples, about 1 % of the instruction-tuning set.
DEFAULT_SAMPLES = 1000

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
FILES = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"

Records = Iterator[tuple[str, Any]]  # where a record is from, and what it is


# ---- reading -------------------------------------------------------------------------------


def read_seed_data(
    source: str, *, split: str = "train", config: str | None = None, column: str | None = None
) -> list[SeedExample]:
    """Read every record of a file, of a folder's files (in sorted order), or of a Hub dataset.

    Args:
        source: A `.jsonl` or `.json` file (an object on each line, or one list of objects), a
            `.parquet`, `.csv` or `.tsv` file, a `.txt` file (blank lines separate the samples;
            without any, line ends do), a folder of such files (other files and subfolders are
            passed over, and .csv and .tsv where there is anything else), or a dataset id.
        split, config: Of the dataset id, which may end in `@revision`; files have none.
        column: A further column, whose value becomes every example's `label`.

    Raises:
        UpitError: nothing there, an unknown extension, an empty or malformed file, or a record
            without usable columns or without the column asked for.
    """
    return list(iter_examples(source, split=split, config=config, column=column))


def iter_examples(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    column: str | None = None,
    text: str = "text",
) -> Iterator[SeedExample]:
    """Yield what `read_seed_data` returns, one by one.

    Args:
        text: Which column is the text.

    Raises:
        UpitError: as `read_seed_data`.
    """
    path = local_data(source)
    if path is None:
        yield from _read_hub(source, split, config, column, text)
        return
    try:
        for file in files_of(path):
            yield from _read_file(file, column, text)
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise UpitError(f"{where} cannot be read ({why}); check the file's rights.") from error


def local_data(source: str) -> Path | None:
    """Return the file or folder that is meant; None for a dataset id.

    Raises:
        UpitError: it can be none, but there is no such file or folder.
    """
    path = Path(os.path.expanduser(source))
    if source and os.path.exists(path):
        return path
    if source[:1] in ("", "/", ".", "~") or path.suffix.lower() in EXTENSIONS:
        raise UpitError(
            f"There is no data at {source!r}; give the path of a {FILES} file or of a "
            "folder of them, or a dataset id."
        )
    return None


def files_of(path: Path) -> list[Path]:
    """Return the files that are read of a file or folder, in order.

    Raises:
        UpitError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in EXTENSIONS]
    files = [file for file in files if not file.name.startswith(".")]
    # Tables of text beside other data are more often results than samples.
    files = [file for file in files if file.suffix.lower() not in _SEPARATORS] or files
    if not files:
        raise UpitError(f"The folder {path} holds no {FILES} file; put the seed data there.")
    return files


def _read_file(path: Path, column: str | None, text: str) -> Iterator[SeedExample]:
    empty = True
    for source, record in records_of(path, column, text):
        empty = False
        yield to_example(record, source, column, text)
    if empty:
        raise UpitError(f"{path} is empty; put at least one sample in it.")


def records_of(path: Path, column: str | None = None, text: str = "text") -> Records:
    """Return the records of a file; of a parquet only the columns that are read, of others all.

    Args:
        column, text: As `iter_examples` takes them.

    Raises:
        UpitError: the file is malformed, or of no kind that is read.
    """
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        kind = f"the extension {suffix}" if suffix else "no extension"
        raise UpitError(f"{path} has {kind}; give seed data as a {FILES} file.")
    if suffix == ".parquet":
        return _parquet_records(path, column, text)
    if suffix in _SEPARATORS:
        return _csv_records(path, _SEPARATORS[suffix], column, text)
    return _text_records(path, text) if suffix == ".txt" else _json_records(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _whole_lines(path):
        yield number, line.rstrip("\r\n")


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Bytes, for their lines end at \n only: JSON strings may hold U+2028 and its kind unescaped.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UpitError(
                    f"{path} line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at "
                    f"column {error.start + 1}); save the file as UTF-8."
                ) from error


def _json_records(path: Path) -> Records:
    lines = _lines(path)
    blank: list[str] = []
    for number, line in lines:
        if not line.strip():
            blank.append(line)
            continue
        if line.lstrip().startswith("["):  # one list of objects, over any number of lines
            rest = (line for _, line in lines)
            records = _parse(path, 1, "\n".join(chain(blank, [line], rest)))
            for index, record in enumerate(records, 1):
                yield f"{path} record {index}", record
            return
        yield f"{path} line {number}", _parse(path, number, line)
        break
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


def _text_records(path: Path, text: str) -> Records:
    """Blocks between blank lines; every line is one where a file has no blank lines to speak of."""
    groups = groupby(_lines(path), key=lambda item: not item[1].strip())
    blocks = (list(group) for blank, group in groups if not blank)
    first, second = next(blocks, []), next(blocks, None)
    found = [[line] for line in first] if second is None else chain([first, second], blocks)
    for block in found:
        yield f"{path} line {block[0][0]}", {text: "\n".join(line for _, line in block)}


def _csv_records(path: Path, separator: str, column: str | None, text: str) -> Records:
    """Rows under a line with the columns' names; whatever a cell holds is text."""
    csv.field_size_limit(2**31 - 1)  # of all cells that this process reads
    reader = csv.reader((line for _, line in _whole_lines(path)), delimiter=separator, strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        if twice := [name for name in names if names.count(name) > 1]:
            raise UpitError(
                f"{path} has two columns with the name `{twice[0]}`; give each its own."
            )
        usable_columns(names, f"{path}", column, text)
        line = reader.line_num
        for cells in reader:
            source, line = f"{path} line {line + 1}", reader.line_num
            if len(cells) > len(names):
                raise UpitError(
                    f"{source} has {len(cells)} cells, but the first line names {len(names)} "
                    "columns; put texts with separators between quotation marks."
                )
            if cells:  # else a blank line
                yield source, {n: cell or None for n, cell in zip(names, cells, strict=False)}
    except csv.Error as error:
        raise UpitError(
            f"{path} line {reader.line_num} is not readable as a table ({first_line(error)}); "
            "write it again."
        ) from error


def _parquet_records(path: Path, column: str | None, text: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = usable_columns(file.schema_arrow.names, f"{path}", column, text)
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=columns))
            for row, record in enumerate(chain.from_iterable(batches), 1):
                yield f"{path} row {row}", _without_padding(record)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
        why = first_line(error)
        raise UpitError(f"{path} is not readable parquet ({why}); write it again.") from error


def _without_padding(value: Any, *, inside: bool = False) -> Any:
    """Return a table's value without what it has only because another row's has it.

    In a table every object of a column has the same keys: arguments of a call that were not given
    arrive as None.
    """
    if isinstance(value, dict):
        return {
            key: _without_padding(inner, inside=True)
            for key, inner in value.items()
            if not (inside and inner is None and key != "content")
        }
    if isinstance(value, list):
        return [_without_padding(inner, inside=True) for inner in value]
    return value


def _read_hub(
    name: str, split: str, config: str | None, column: str | None, text: str
) -> Iterator[SeedExample]:
    dataset = load_hub(name, split, config)
    columns = usable_columns(dataset.column_names, f"The dataset {name}", column, text)
    empty = True
    for row, record in enumerate(dataset.select_columns(columns), 1):
        empty = False
        source = f"{name} {split} row {row}"
        yield to_example(_without_padding(record), source, column, text)
    if empty:
        raise UpitError(f"The dataset {name} has no rows in {split!r}; choose another split.")


def load_hub(name: str, split: str, config: str | None) -> Any:
    """Load a dataset by its id.

    Raises:
        UpitError: it cannot be loaded.
    """
    import datasets

    try:
        repo, _, revision = name.partition("@")
        return datasets.load_dataset(repo, config, split=split, revision=revision or None)
    except Exception as error:  # the Hub's client and the builders raise all kinds
        remedy = f"check the dataset's id, its config and that it has the split {split!r}"
        if isinstance(error, ConnectionError):
            remedy = "load the dataset once while online, so that it is in the local cache"
        raise UpitError(
            f"{name!r} is no file or folder here, and could not be loaded as a dataset from the "
            f"Hub ({first_line(error)}); give the path of a {FILES} file, or {remedy}."
        ) from error


# ---- sampling -------------------------------------------------------------------------------


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
