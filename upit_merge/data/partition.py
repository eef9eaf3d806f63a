"""A data set in three files that share no sample: which row goes where, and how they are written.

The choice is made by the `datasets` library (`train_test_split`), once for every sample: rows that
a model would read alike are one sample, and go together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upit_merge.data.examples import (
    JSON_EXTENSIONS,
    files_of,
    iter_examples,
    load_hub,
    local_data,
    passed_over,
    readable_table,
    records_of,
)
from upit_merge.data.json_records import json_records
from upit_merge.data.json_text import NotingDecoder
from upit_merge.data.records import SeedExample
from upit_merge.errors import UpitError, counted, first_line, shown

LOG = logging.getLogger(__name__)

TRAIN, SEED, HELD_OUT = PARTS = ("train", "seed", "held-out")
SUFFIXES = (".jsonl", ".parquet")  # of what is no table, and of tables

# If not given, a tenth of the samples each, but not more than are of use.
_SHARE, _MOST = 10, 1000
_BATCH_ROWS = 1000

# A number of samples, or a fraction of them; None is the default.
Amount = int | float | None


@dataclass(frozen=True)
class DataSource:
    """What is divided.

    Attributes:
        name: A file, a folder of files, or a dataset id.
        subset, split: Of a dataset id.
    """

    name: str
    subset: str | None = None
    split: str = "train"

    @property
    def files(self) -> list[Path]:
        """The files that are read; none of a dataset id.

        Raises:
            UpitError: there is nothing there.
        """
        path = local_data(self.name)
        return [] if path is None else files_of(path)

    @property
    def passed_over(self) -> list[str]:
        """The names of what is not read of a folder; see `passed_over`."""
        path = local_data(self.name)
        return passed_over(path) if path is not None and path.is_dir() else []

    @property
    def is_table(self) -> bool:
        """Whether the rows are a table's with types of its own, and stay parquet."""
        return all(file.suffix.lower() == ".parquet" for file in self.files)

    def examples(self, column: str | None) -> Iterator[SeedExample]:
        """Yield every row as the router and the trainer read it; see `iter_examples`."""
        return iter_examples(self.name, split=self.split, config=self.subset, column=column)


@dataclass(frozen=True)
class Samples:
    """The rows of a data set, told apart by what a model reads of them.

    Attributes:
        of_row: For every row the number of its sample; equal rows have one.
        groups: For every sample its value in the column that was asked for; None without one.
    """

    of_row: Sequence[int]
    groups: Sequence[str] | None

    @property
    def count(self) -> int:
        return 1 + max(self.of_row, default=-1)

    @property
    def repeats(self) -> int:
        """Rows that are there already."""
        return len(self.of_row) - self.count


def read_samples(source: DataSource, column: str | None) -> Samples:
    """Read every row once.

    Raises:
        UpitError: as `iter_examples`: a row that no model could be given, or without the column.
    """
    numbers: dict[bytes, int] = {}
    of_row: list[int] = []
    groups: list[str] = []
    for example in source.examples(column):
        number = numbers.setdefault(_content(example), len(numbers))
        if number == len(groups):
            groups.append(str(example.label))
        of_row.append(number)
    return Samples(of_row, groups if column is not None else None)


def _content(example: SeedExample) -> bytes:
    """Return what tells apart what models are given."""
    parts: list[Any] = [example.text, example.messages, example.prompt, example.completion]
    parts += [example.tools, example.template_options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def divide(
    samples: Samples, source: str, *, seed_samples: Amount, held_out: Amount, seed: int
) -> list[str]:
    """Choose the part of every row.

    Args:
        source: The data's name, for messages.
        seed_samples, held_out: How many samples, or which fraction of them; 0 is none.
        seed: Of the random choice.

    Returns:
        One of `PARTS` for each row.

    Raises:
        UpitError: there are too few samples, as a whole or in a group.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    counts = {HELD_OUT: _count(held_out, samples.count), SEED: _count(seed_samples, samples.count)}
    _check_enough(samples, source, counts)
    columns: dict[str, Any] = {"sample": [*range(samples.count)]}
    kinds: dict[str, Any] = {"sample": Value("int64")}
    if samples.groups is not None:
        columns["group"] = samples.groups
        kinds["group"] = ClassLabel(names=sorted(set(samples.groups)))
    rest = Dataset.from_dict(columns, features=Features(kinds))
    part_of = [TRAIN] * samples.count
    for part, count in counts.items():
        if not count:
            continue
        try:
            both = rest.train_test_split(
                test_size=count,
                seed=seed,
                stratify_by_column=None if samples.groups is None else "group",
                keep_in_memory=True,
            )
        except ValueError as error:
            raise UpitError(
                f"{source} cannot be divided group by group ({first_line(error)}); ask for fewer "
                "samples, or leave out --group-by."
            ) from error
        rest = both["train"]
        for sample in both["test"]["sample"]:
            part_of[sample] = part
    return [part_of[sample] for sample in samples.of_row]


def _count(amount: Amount, total: int) -> int:
    if amount is None:
        return min(_MOST, max(1, total // _SHARE))
    return amount if isinstance(amount, int) else max(1, round(amount * total))


def _check_enough(samples: Samples, source: str, counts: Mapping[str, int]) -> None:
    wanted = sum(counts.values())
    if wanted >= samples.count:
        raise UpitError(
            f"{source} has {counted(samples.count, 'sample')} that differ, too few for "
            f"{counts[SEED]:,} as seed data, {counts[HELD_OUT]:,} held out and some to train on; "
            "lower --seed-samples and --held-out, or give more data."
        )
    if samples.groups is None:
        return
    sizes = Counter(samples.groups)
    least = 1 + sum(map(bool, counts.values()))
    small, size = min(sizes.items(), key=lambda item: item[1])
    if size < least:
        raise UpitError(
            f"{source} has {counted(size, 'sample')} of the group {shown(small)}, and {least} are "
            "needed to have one in every file; leave out --group-by, or that group."
        )
    for part, count in counts.items():
        if 0 < count < len(sizes):
            option = {SEED: "--seed-samples", HELD_OUT: "--held-out"}[part]
            raise UpitError(
                f"{source} has {len(sizes)} groups, of which {counted(count, 'sample')} cannot hold "
                f"one each; raise {option}, or leave out --group-by."
            )


# ---- writing -------------------------------------------------------------------------------


def write_parts(source: DataSource, part_of: Sequence[str], files: Mapping[str, Path]) -> None:
    """Write every row, with all its columns and in its order, into the file of its part.

    Args:
        part_of: See `divide`.
        files: Where each part goes; parquet if `source.is_table`, else jsonl.

    Raises:
        UpitError: the rows cannot be written in one file.
    """
    (_write_tables if source.is_table else _write_lines)(source, part_of, files)


def _write_lines(source: DataSource, part_of: Sequence[str], paths: Mapping[str, Path]) -> None:
    parts = iter(part_of)
    with contextlib.ExitStack() as stack:
        files = {
            part: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            for part, path in paths.items()
        }
        for line in _all_lines(source):
            part = next(parts, None)
            if part is None:
                raise _changed(source)
            files[part].write(f"{line}\n")
    if next(parts, None) is not None:
        raise _changed(source)


def _changed(source: DataSource) -> UpitError:
    return UpitError(f"{source.name} was written to while it was read; split it again.")


def _all_lines(source: DataSource) -> Iterator[str]:
    """Yield every row as a line of JSON; those that are JSON already, as they are."""
    is_told = False
    for file in source.files:
        for where, line, oddity in _lines_of_file(file):
            if oddity is not None and not is_told:
                is_told = True
                LOG.warning(
                    "%s has %s: it is written as it is, and other programs may refuse the file.",
                    where,
                    oddity,
                )
            yield line


def _lines_of_file(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yield where each row is from, its line, and what in it other programs may not read."""
    if path.suffix.lower() in JSON_EXTENSIONS:
        for record in json_records(path):
            yield record.source, record.text, record.oddity
        return
    for where, row in records_of(path, whole=True):
        yield where, *_line(where, row)


def _line(where: str, row: Any) -> tuple[str, str | None]:
    try:
        line = json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UpitError(
            f"{where} cannot be written as JSON ({first_line(error)}); split the parquet files by "
            "themselves, which stay parquet."
        ) from error
    decoder = NotingDecoder()
    if "NaN" in line or "Infinity" in line:  # as a number, or in a text
        decoder.decode(line)
    return line, decoder.oddity


def _write_tables(source: DataSource, part_of: Sequence[str], paths: Mapping[str, Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    parts = iter(part_of)
    schema: Any = None
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for batch in _table_batches(source):
            if schema is None:
                schema = batch.schema
                for part, path in paths.items():
                    writer = pyarrow.parquet.ParquetWriter(path, schema)
                    files[part] = stack.enter_context(writer)
            elif not batch.schema.equals(schema):
                raise UpitError(
                    f"The files of {source.name} are tables of other columns; split them one by "
                    "one, each into a folder of its own (--out)."
                )
            here = [next(parts) for _ in range(batch.num_rows)]
            for part, file in files.items():
                mask = pyarrow.array([of_row == part for of_row in here])
                if (rows := batch.filter(mask)).num_rows:
                    file.write(rows)


def _table_batches(source: DataSource) -> Iterator[Any]:
    """Yield the rows as pieces of an Arrow table, with all columns and their types."""
    if files := source.files:
        for file in files:
            yield from _batches_of(file)
        return
    dataset = load_hub(source.name, source.split, source.subset)
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from table.combine_chunks().to_batches()


def _batches_of(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with readable_table(path), pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)
