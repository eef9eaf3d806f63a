"""`upit-merge demo`: from text on this machine to a measured mixture of experts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.table import Table

from upit_merge.demo.corpus import Domain, load_domains
from upit_merge.demo.evaluation import perplexity, set_gates
from upit_merge.demo.training import DemoModels, TrainingBudget, train_demo_models
from upit_merge.errors import UpitError
from upit_merge.io.text_file import write_json
from upit_merge.models.gates import training_free_gates
from upit_merge.models.mixture import opened_mixture
from upit_merge.report.tables import show
from upit_merge.runtime.parallel import progress_bar

RECIPE = """\
# What `upit-merge demo` runs: checkpoints of a small Llama, fine-tuned on three kinds of text one
# after the other, become 8 experts; the router learns from text of all three kinds.
#
#   upit-merge demo demo/                       (makes the models and the data, then runs this)
#   cd demo && mergekit-yaml demo.yml again/    (runs it once more)
merge_method: upit
base_model: ./base
models:
  - model: ./sft/checkpoint-*
dtype: float32
parameters:
  num_experts: 8
  experts_per_token: 2
router:
  data: ./seed.jsonl
"""

_SEED_SAMPLES_PER_DOMAIN = 200
_RANDOM_GATES = 3


@dataclass(frozen=True)
class Row:
    """A model's held-out perplexity per domain."""

    model: str
    perplexities: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric mean over the domains: exp of the mean of their losses."""
        return geometric_mean(self.perplexities)


def run_demo(
    folder: Path, *, seed: int = 0, quiet: bool = False, budget: TrainingBudget | None = None
) -> None:
    """Train small models, merge them with `mergekit-yaml`, and print a table of what came out.

    Args:
        folder: Receives `base/`, `sft/checkpoint-*/`, `seed.jsonl`, `demo.yml`, `moe/` and
            `results.json`; must be empty or not exist.
        seed: Of initial weights, the order of training data, the seed samples and the merge.
        budget: Sizes and lengths of the training; the default takes two minutes on two cores.

    Raises:
        UpitError: the folder is not empty, or a step failed.
    """
    new_folder(folder)
    started = time.perf_counter()
    _silence_transformers()
    if budget is None:
        print("This takes two to three minutes on two CPU cores that have nothing else to do.")

    domains = load_domains()
    models = train_demo_models(folder, domains, seed=seed, budget=budget, quiet=quiet)
    _write_seed_data(folder / "seed.jsonl", domains, seed)
    (folder / "demo.yml").write_text(RECIPE, encoding="utf-8")
    _merge(folder, seed, quiet=quiet)
    rows = _measure(folder, models, domains, quiet=quiet)

    write_json(
        folder / "results.json",
        {
            "domains": [domain.name for domain in domains],
            "rows": [{"model": r.model, "perplexities": r.perplexities} for r in rows],
        },
    )
    show(_table(rows, domains))
    for sentence in _verdicts(rows):
        print(sentence)
    minutes = (time.perf_counter() - started) / 60
    print(f"Done in {minutes:.1f} minutes. The model is in {folder / 'moe'}.")


def new_folder(folder: Path) -> None:
    """Make a folder.

    Raises:
        UpitError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UpitError(f"The folder {folder} is not empty; give a new one.")
    folder.mkdir(parents=True, exist_ok=True)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _write_seed_data(path: Path, domains: Sequence[Domain], seed: int) -> None:
    """Training text of every domain, in equal shares; the held-out text stays out."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for domain in domains:
            count = min(_SEED_SAMPLES_PER_DOMAIN, len(domain.train))
            for text in generator.sample(domain.train, count):
                file.write(json.dumps({"text": text, "domain": domain.name}) + "\n")


def _merge(folder: Path, seed: int, *, quiet: bool) -> None:
    """Run the recipe as a user would, with stock mergekit."""
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "demo.yml", "moe"]
    command += ["--random-seed", str(seed), *(["--quiet"] if quiet else [])]
    print("$ mergekit-yaml " + " ".join(command[3:]), flush=True)
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise UpitError(f"mergekit-yaml failed in {folder}; see its message above.")


def _measure(
    folder: Path, models: DemoModels, domains: Sequence[Domain], *, quiet: bool
) -> list[Row]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "moe")

    def row(name: str, model: Any) -> Row:
        values = (perplexity(model, tokenizer, domain.heldout) for domain in domains)
        result = Row(name, tuple(values))
        bar.update()
        return result

    total = len(models.checkpoints) + 3 + _RANDOM_GATES
    with progress_bar(total, "held-out perplexity", quiet=quiet, unit="model") as bar:
        rows = [row("base", AutoModelForCausalLM.from_pretrained(models.base))]
        for path in models.checkpoints:
            rows.append(row(path.name, AutoModelForCausalLM.from_pretrained(path)))
        rows.append(row("average of checkpoints", average_model(models.checkpoints)))
        moe = AutoModelForCausalLM.from_pretrained(folder / "moe")
        built = row("MoE as built", moe)
        rows.append(_mean_row("MoE, random gate", _with_random_gates(moe, folder, row)))
        rows.append(built)
    return rows


def average_model(checkpoints: Sequence[Path]) -> Any:
    """The checkpoint whose weights are the mean of all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints[0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in checkpoints[1:]:
        other = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for name, tensor in state.items():
            tensor += other[name]
    model.load_state_dict({name: tensor / len(checkpoints) for name, tensor in state.items()})
    return model


def _with_random_gates(moe: Any, folder: Path, row: Any) -> Iterable[Row]:
    """The same experts behind several random gates, those a recipe without `router:` gets."""
    config = moe.config
    with opened_mixture(folder / "moe") as checkpoint:
        for seed in range(_RANDOM_GATES):
            gates = training_free_gates(
                checkpoint, config.num_hidden_layers, config.num_local_experts, seed
            )
            set_gates(moe, gates)
            yield row("", moe)


def _mean_row(name: str, rows: Iterable[Row]) -> Row:
    """Geometric means, domain by domain."""
    columns = zip(*(row.perplexities for row in rows), strict=True)
    return Row(f"{name} (mean of {_RANDOM_GATES})", tuple(map(geometric_mean, columns)))


def _table(rows: Sequence[Row], domains: Sequence[Domain]) -> Table:
    table = Table(title="Held-out perplexity (lower is better)", title_justify="left")
    table.add_column("model")
    for domain in domains:
        table.add_column(domain.name, justify="right")
    table.add_column("mean", justify="right")
    for row in rows:
        style = "bold" if row is rows[-1] else ""
        cells = (f"{value:.2f}" for value in (*row.perplexities, row.mean))
        table.add_row(row.model, *cells, style=style)
    return table


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """The MoE as built, the last row, against the rows that it should beat."""
    built = rows[-1]
    sentences = []
    checkpoints = [row for row in rows if row.model.startswith("checkpoint-")]
    references = [rows[-2], rows[-3], min(checkpoints, key=lambda row: row.mean)]
    for reference in references:
        change = built.mean / reference.mean - 1
        word = "lower" if change < 0 else "HIGHER"
        sentences.append(
            f"The mean perplexity of the MoE as built is {abs(change):.1%} {word} than that of "
            f"{reference.model} ({reference.mean:.2f})."
        )
    return sentences
