"""Data of samples: files or a Hub dataset -> raw examples -> a sample of them.

The router's seed data and what models are trained on are read alike. `read_seed_data` and
`sample_examples` give examples, which `data/tokens.py` turns into token ids and
`data/training_set.py` into what a trainer takes. Every mistake in the data is an `UpitError` that
names the file and the line, record or row.
"""

from __future__ import annotations

import csv
import logging
import os
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from upit_merge.data.json_records import json_records
from upit_merge.data.json_text import check_finite
from upit_merge.data.lines import lines_of, whole_lines
from upit_merge.data.records import SeedExample, columns_read, to_example, usable_columns
from upit_merge.errors import UpitError, counted, first_line, one_line

LOG = logging.getLogger(__name__)

# The paper trains its router on 500 to 5,000 samples, about 1 % of the instruction-tuning set.
DEFAULT_SAMPLES = 1000

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_EXTENSIONS = (".jsonl", ".json")
EXTENSIONS = (*JSON_EXTENSIONS, ".parquet", ".csv", ".tsv", ".txt")
FILES = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"

# What programs put behind one of those.
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

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
    there = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    files = [file for file in there if file.suffix.lower() in EXTENSIONS]
    # Tables of text beside other data are more often results than samples.
    files = [file for file in files if file.suffix.lower() not in _SEPARATORS] or files
    packed = [file for file in there if _is_compressed_data(file)]
    if not files:
        first = f" ({one_line(packed[0].name)} is compressed)" if packed else ""
        remedy = "unpack it" if packed else "put the seed data there"
        raise UpitError(f"The folder {path} holds no {FILES} file{first}; {remedy}.")
    if packed:
        _tell_packed(path, packed[0].name, len(packed))
    return files


def passed_over(folder: Path) -> list[str]:
    """Return the names of what is not read of a folder, but for what is hidden or compressed."""
    read = {*files_of(folder)}
    return [
        one_line(file.name) + "/" * file.is_dir()
        for file in sorted(folder.iterdir())
        if not (file in read or file.name.startswith(".") or _is_compressed_data(file))
    ]


def _is_compressed_data(path: Path) -> bool:
    inner = Path(path.stem).suffix.lower()
    return path.suffix.lower() in _COMPRESSED and inner in EXTENSIONS


@cache  # once, however often the folder is read
def _tell_packed(folder: Path, name: str, count: int) -> None:
    LOG.warning(
        "%s passed over in %s, such as %s; unpack what is to be read.",
        counted(count, "compressed file"),
        folder,
        one_line(name),
    )


def _read_file(path: Path, column: str | None, text: str) -> Iterator[SeedExample]:
    empty = True
    for source, record in records_of(path, column, text):
        empty = False
        yield to_example(record, source, column, text)
    if empty:
        raise UpitError(f"{path} is empty; put at least one sample in it.")


def records_of(
    path: Path, column: str | None = None, text: str = "text", *, whole: bool = False
) -> Records:
    """Return the records of a file; of a parquet only the columns that are read, of others all.

    Args:
        column, text: As `iter_examples` takes them.
        whole: All columns of a parquet, too.

    Raises:
        UpitError: the file is malformed, or of no kind that is read.
    """
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise UpitError(
            f"{path} is compressed; unpack it, and give the {FILES} file that was in it."
        )
    if suffix not in EXTENSIONS:
        kind = f"the extension {suffix}" if suffix else "no extension"
        raise UpitError(f"{path} has {kind}; give seed data as a {FILES} file.")
    if suffix == ".parquet":
        return _parquet_records(path, column, text, whole)
    if suffix in _SEPARATORS:
        return _csv_records(path, _SEPARATORS[suffix], column, text)
    if suffix == ".txt":
        return _text_records(path, text)
    records = json_records(path, columns_read(column, text))
    return ((record.source, record.value) for record in records)


def _text_records(path: Path, text: str) -> Records:
    """Blocks between blank lines; every line is one where a file has no blank lines to speak of."""
    groups = groupby(lines_of(path), key=lambda item: not item[1].strip())
    blocks = (list(group) for blank, group in groups if not blank)
    first, second = next(blocks, []), next(blocks, None)
    found = [[line] for line in first] if second is None else chain([first, second], blocks)
    for block in found:
        yield f"{path} line {block[0][0]}", {text: "\n".join(line for _, line in block)}


def _csv_records(path: Path, separator: str, column: str | None, text: str) -> Records:
    """Rows under a line with the columns' names; whatever a cell holds is text."""
    csv.field_size_limit(2**31 - 1)  # of all cells that this process reads
    reader = csv.reader((line for _, line in whole_lines(path)), delimiter=separator, strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        _check_names(names, path)
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


def _parquet_records(path: Path, column: str | None, text: str, whole: bool) -> Records:
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    with readable_table(path), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        columns = usable_columns(names, f"{path}", column, text)
        _check_names([*names] if whole else [name for name in names if name in columns], path)
        chosen = None if whole else columns
        batches = (batch.to_pylist() for batch in file.iter_batches(columns=chosen))
        is_told = False
        for row, record in enumerate(chain.from_iterable(batches), 1):
            source = f"{path} row {row}"
            if not whole:
                yield source, _from_table(record, source)
                continue
            kept = _whole(record, columns)
            if not is_told and kept != record:
                is_told = True
                LOG.info("%s has keys without a value, which models are not given: left out.", path)
            yield source, kept


@contextmanager
def readable_table(path: Path) -> Iterator[None]:
    """Tell in one sentence what is wrong with a parquet file that is read inside.

    Raises:
        UpitError: it is not parquet, or not all of it.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
        why = first_line(error)
        raise UpitError(f"{path} is not readable parquet ({why}); write it again.") from error


def _check_names(names: Sequence[str], path: Path) -> None:
    """Refuse columns of one name, of which records would have the last."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UpitError(f"{path} has two columns with the name `{twice[0]}`; give each its own.")


def _from_table(record: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the columns of a row that are read.

    Raises:
        UpitError: as `check_finite`.
    """
    for name, value in record.items():
        if isinstance(value, list | dict):
            check_finite(value, f"`{name}`", source)
    return dict(_without_padding(record))


def _whole(record: dict[str, Any], columns: Collection[str]) -> dict[str, Any]:
    """Return a row of which the columns that models read are as they are read of the table."""
    return {
        name: _without_padding(value) if name in columns else value
        for name, value in record.items()
    }


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
        yield to_example(_from_table(record, source), source, column, text)
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
