"""Do other programs read what `upit-merge` writes, and compute the same?

python -m benchmarks.runtimes --folder F [--only qwen2-glm4_moe ...] [--readers vllm mlx ...] [--json FILE]

For every dense family and the format it becomes, a small mixture (four experts of four checkpoints,
top-2; random weights, norms and biases; SmolLM2's tokenizer and chat template) is read by
transformers 5, which is the reference, transformers 4, llama.cpp (converter and library, float32 and
Q8_0), vLLM on the CPU, mlx-lm and mistral.rs, each in an environment of its own that is made of
pinned packages in `--cache` (about 8 GB) and used again. One table says how many of 16 greedy tokens
after a text are the reference's, how far logprobs of the whole vocabulary are off at the text's
positions and those of the 16 (mistral.rs: those of the chat's tokens), and what the reader's own
chat gives and where it ends. What a reader cannot do is a row that says so.

Rows that FILE holds already are not made again, unless `--again`. On two cores a family takes two
minutes, and environments ten, once. Linux; llama.cpp's library is prebuilt where there is npm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.runtimes_environments import (
    READERS,
    REFERENCE,
    EnvironmentFailure,
    Environments,
    Reader,
)
from benchmarks.runtimes_models import CASES, TEXT, TURNS, Case, NoEnd, mixture_of, tokenizer_folder
from benchmarks.runtimes_table import Row, compared, failed, overview, row_from_json, table
from upit_merge.errors import UpitError

LIMIT = 600  # seconds for one reader


class Failure(Exception):
    """A reader's process, or a converter's, ended without a result."""


def run(command: Sequence[str], variables: dict[str, str]) -> None:
    """Run a process to its end.

    Raises:
        Failure: the last line of what it said, if it failed.
    """
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=LIMIT, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"nothing after {LIMIT} seconds") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failure(lines[-1] if lines else f"exit status {done.returncode}")


def converted(model: Path, case: Case, reader: Reader, environments: Environments) -> Path:
    """Convert a mixture with llama.cpp's own script; returns the file."""
    out = model.with_name(f"{reader.gguf}.gguf")
    [python, *_], variables = environments.command(reader)
    command = [python, str(environments.converter()), str(model), "--outfile", str(out)]
    run([*command, "--outtype", reader.gguf, *case.convert], variables)
    return out


class Bench:
    """Mixtures in a folder, and what the reference makes of each."""

    def __init__(self, folder: Path, environments: Environments) -> None:
        self.folder, self.environments = folder, environments
        self.tokenizer = tokenizer_folder(folder)

    def read(self, reader: Reader, model: Path, place: Path, job: dict[str, Any]) -> dict[str, Any]:
        """Run a reader's probe; returns what it found, its logprobs beside in a file."""
        job_file, out = place / "job.json", place / f"{reader.name}.json"
        job_file.write_text(json.dumps(job))
        for path in (out, out.with_suffix(".npy")):
            path.unlink(missing_ok=True)
        command, variables = self.environments.command(reader)
        try:
            run([*command, str(model), str(job_file), str(out)], variables)
        except Failure as error:
            if not out.is_file():
                raise
            found = json.loads(out.read_text())
            found["errors"].setdefault("process", str(error))
            return found
        return json.loads(out.read_text())

    def rows(self, case: Case, readers: Sequence[Reader]) -> Iterator[tuple[Reader, Row]]:
        """Yield a row for every reader, the reference's too; makes the mixture."""
        try:
            moe = mixture_of(case, self.folder, self.tokenizer)
        except (UpitError, NoEnd) as error:
            for reader in readers:
                yield (
                    reader,
                    failed(case.family, case.architecture, reader.title, "merge", str(error)),
                )
            return
        place = moe.parent
        job: dict[str, Any] = {"text": TEXT, "turns": TURNS, "ids": None, "tokens": None}
        reference = self.read(REFERENCE, moe, place, job)
        if reference["errors"]:
            raise SystemExit(f"{case.name}: the reference fails: {reference['errors']}")
        right = np.load(place / f"{REFERENCE.name}.npy")
        vocabulary = AutoTokenizer.from_pretrained(moe).get_vocab()
        names = {number: name for name, number in vocabulary.items()}
        job |= {"ids": reference["ids"], "tokens": reference["tokens"]}
        for reader in readers:
            row = Row(case.family, case.architecture, reader.title, quantised=reader.quantised)
            step = "environment"
            try:
                self.environments.command(reader)
                step = "convert"
                model = converted(moe, case, reader, self.environments) if reader.gguf else moe
                step = "process"
                found = reference
                if reader is not REFERENCE:
                    found = self.read(reader, model, place, job)
            except (EnvironmentFailure, Failure) as error:
                yield reader, failed(case.family, case.architecture, reader.title, step, str(error))
                continue
            finally:
                (place / f"{reader.gguf}.gguf").unlink(missing_ok=True)
            row.reader += f" {found['version']}" if "version" in found else ""
            logprobs = place / f"{reader.name}.npy"
            both = (right, np.load(logprobs)) if logprobs.is_file() else None
            yield reader, compared(row, reference, found, both, names)


def stored_in(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else {}


def store(path: Path, case: str, reader: str, row: dict[str, Any]) -> None:
    """Add a row to a file, which another run may have written to since."""
    results = stored_in(path)
    results.setdefault(case, {})[reader] = row
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [case.name for case in CASES]
    readers = {reader.name: reader for reader in READERS}
    parser.add_argument("--folder", type=Path, required=True, help="for the mixtures; 60 MB each")
    parser.add_argument("--only", nargs="+", default=names, help=", ".join(names))
    parser.add_argument("--readers", nargs="+", choices=readers, default=list(readers))
    cache = Path(tempfile.gettempdir()) / "upit-runtimes"
    parser.add_argument("--cache", type=Path, default=cache, help="for the environments")
    parser.add_argument("--json", type=Path, help="receives the rows, and has those of before")
    parser.add_argument("--again", action="store_true", help="rows that FILE holds, too")
    options = parser.parse_args()
    if unknown := sorted({*options.only} - {*names}):
        parser.error(f"--only: {unknown[0]} is none of {', '.join(names)}")
    logging.disable_progress_bar()
    for folder in (options.folder, options.cache):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.folder, Environments(options.cache.resolve()))
    results = stored_in(options.json) if options.json else {}
    for case in (case for case in CASES if case.name in options.only):
        kept = results.setdefault(case.name, {})
        wanted = [readers[name] for name in options.readers if options.again or name not in kept]
        if not wanted:
            continue
        for reader, row in bench.rows(case, wanted):
            kept[reader.name] = row.as_json()
            print(table([row]).splitlines()[-1], flush=True)
            if options.json:
                store(options.json, case.name, reader.name, kept[reader.name])
    results = stored_in(options.json) if options.json else results
    found = {
        name: {
            reader: row_from_json(results[name][reader])
            for reader in readers
            if reader in results[name]
        }
        for name in names
        if name in results
    }
    rows = [row for of_one in found.values() for row in of_one.values()]
    print(f"\n{overview(found)}\n\n{table(rows)}\n")
    print(f"{sum(row.right for row in rows)} of {len(rows)} right.")


if __name__ == "__main__":
    main()
