"""`upit-merge split`: one data file -> what to train on, seed data, and what to measure with."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from upit_merge.commands.first_recipe.draft import quoted
from upit_merge.data.examples import local_data
from upit_merge.data.partition import (
    HELD_OUT,
    PARTS,
    SEED,
    SUFFIXES,
    TRAIN,
    Amount,
    DataSource,
    divide,
    read_samples,
    write_parts,
)
from upit_merge.errors import UpitError, argument, counted, shown
from upit_merge.io.disk import explained_failures
from upit_merge.io.text_file import sync_file
from upit_merge.output.lock import exclusive
from upit_merge.output.staging import remove_if_empty
from upit_merge.report.next_steps import tell_next
from upit_merge.report.tables import show

LOG = logging.getLogger(__name__)

_PURPOSES = {
    TRAIN: "to fine-tune on",
    SEED: "for the router",
    HELD_OUT: "to measure with",
}


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is divided.

    Args:
        seed_samples, held_out: How many samples, or which fraction; None: a tenth, up to 1,000.
        group_by: Column whose values are represented in every file as in the whole.
        seed: Of the random choice.
        force: Replace files that are there, and remove what else is of an earlier split.
        quiet: Print nothing.
    """

    seed_samples: Amount = None
    held_out: Amount = None
    group_by: str | None = None
    seed: int = 0
    force: bool = False
    quiet: bool = False


def parse_amount(option: str, text: str | None) -> Amount:
    """Read a number of samples, or a fraction of them, from the command line.

    Raises:
        UpitError: it is neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d{1,15}", text.strip()):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UpitError(
            f"{option} is {shown(text)}; give a number of samples, or a fraction such as 0.05."
        )
    return value


def split_data(source: DataSource, out: Path, options: SplitOptions) -> None:
    """Write `train`, `seed` and `held-out` files that have no sample in common.

    Rows keep their order and all their columns. Rows that a model would read alike are in one file.

    Args:
        out: The folder; made if it is not there.

    Raises:
        UpitError: the data cannot be read or is too little, or files are there already.
    """
    suffix = SUFFIXES[source.is_table]
    wanted = {SEED: options.seed_samples, HELD_OUT: options.held_out, TRAIN: None}
    files = {part: out / f"{part}{suffix}" for part in PARTS if wanted[part] != 0}
    _check_free(source, out, files, force=options.force)
    if names := source.passed_over:
        LOG.warning(
            "Passed over in %s: %s; what is to be split, too, must be .jsonl, .json, .parquet or "
            ".txt, and in no folder of its own.",
            source.name,
            _some(names),
        )
    samples = read_samples(source, options.group_by)
    part_of = divide(
        samples,
        source.name,
        seed_samples=options.seed_samples,
        held_out=options.held_out,
        seed=options.seed,
    )
    with explained_failures(out):
        _write(source, part_of, out, files, force=options.force)
    if options.quiet:
        return
    show(_table(part_of, files))
    if samples.repeats:
        print(
            f"{counted(samples.repeats, 'row')} say the same as an earlier one, and are in the "
            "same file."
        )
    tell_next(*_next_steps(files))


def _check_free(source: DataSource, out: Path, files: Mapping[str, Path], *, force: bool) -> None:
    """Refuse to write over anything, and over the data itself in any case.

    Raises:
        UpitError: naming the file.
    """
    if out.exists() and not out.is_dir():
        raise UpitError(f"{out} is a file; give a folder as --out.")
    path = local_data(source.name)
    if path is not None and path.is_dir() and out.is_dir() and path.samefile(out):
        raise UpitError(f"{out} is the folder that is split; give another one as --out.")
    written = {*files.values()}
    for file in [*files.values(), *_others(out, files)]:
        if any(file.exists() and file.samefile(data) for data in source.files):
            raise UpitError(f"{file} is the data itself; give another folder as --out.")
        if file.is_dir() or (os.path.lexists(file) and not force):
            action = "replace" if file in written else "remove"
            remedy = "" if file.is_dir() else f", or pass --force to {action} it"
            raise UpitError(f"{file} is there already; give another folder as --out{remedy}.")


def _others(out: Path, files: Mapping[str, Path]) -> list[Path]:
    """Return what else an earlier split may have written, which may share samples with `files`."""
    every = [out / f"{part}{suffix}" for suffix in SUFFIXES for part in PARTS]
    return [path for path in every if path not in files.values()]


def _some(names: Sequence[str], most: int = 10) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _write(
    source: DataSource,
    part_of: Sequence[str],
    out: Path,
    files: Mapping[str, Path],
    *,
    force: bool,
) -> None:
    """Write all files aside, and move them into place last; then remove others of an earlier split.

    Raises:
        UpitError: another run is writing there, or has just written.
    """
    created = [path for path in (out, *out.parents) if not path.exists()]
    drafts = {part: path.with_name(f".{path.name}.draft") for part, path in files.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            _check_free(source, out, files, force=force)  # another split may have just ended
            try:
                for draft in drafts.values():
                    draft.unlink(missing_ok=True)  # it may be a link to anything
                write_parts(source, part_of, drafts)
                for draft in drafts.values():
                    sync_file(draft)
                for part, draft in drafts.items():
                    os.replace(draft, files[part])
                for old in _others(out, files):
                    if os.path.lexists(old):
                        old.unlink()
                        LOG.info("%s removed: it was of an earlier split.", old)
            finally:
                for draft in drafts.values():
                    draft.unlink(missing_ok=True)
    finally:
        for folder in created:
            remove_if_empty(folder)


def _table(part_of: Sequence[str], files: Mapping[str, Path]) -> Table:
    counts = Counter(part_of)
    table = Table(title="No sample is in two files", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("")
    for part, path in files.items():
        table.add_row(path.as_posix(), f"{counts[part]:,}", _PURPOSES[part])
    return table


def _next_steps(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield what each file is given to."""
    yield "fine-tune on it", f"data: {quoted(files[TRAIN].as_posix())}"
    if seeds := files.get(SEED):
        yield "then, a recipe", f"upit-merge init . --data {argument(seeds.as_posix())}"
    if held_out := files.get(HELD_OUT):
        data = argument(held_out.as_posix())
        yield "after the merge", f"upit-merge evaluate out/ --data {data}"
