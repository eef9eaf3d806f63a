"""What `upit-merge plan --data` says of the situations of benchmarks.real, before anything is merged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.real.arms import FINISHED, NOT_FINISHED, Situation
from benchmarks.real.recipes import recipe
from benchmarks.real.stages import Stage
from benchmarks.real.text import KINDS, load_rows, write_samples
from upit_merge.commands.outlook import look_ahead
from upit_merge.commands.preview import checkpoint_losses
from upit_merge.commands.run import RunOptions, seed_set
from upit_merge.config.recipe import parse_recipe
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.merge.inputs import opened

SAMPLES = (96, 12)
EXPECTED = {FINISHED.name: "worth", NOT_FINISHED.name: "not_worth"}  # of the first number


@dataclass(frozen=True)
class Verdict:
    """What is said of a situation, on many samples and on few."""

    situation: Situation

    @property
    def name(self) -> str:
        return f"verdict on {self.situation.name}"

    def needs(self) -> list[Stage]:
        return self.situation.needs()


VERDICTS = [Verdict(FINISHED), Verdict(NOT_FINISHED)]


def judge_ahead(folder: Path, situation: Situation, seed: int) -> dict[str, Any]:
    """Ask on held-out samples, as `plan --data --group-by kind` does."""
    base, checkpoints = folder / "base", situation.checkpoints(folder, seed)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), load_rows(folder)
    found: dict[str, Any] = {}
    for count in SAMPLES:
        data = folder / f"seed-{seed}" / f"held-out-{count}.jsonl"
        write_samples(data, tokenizer, rows.verdict, count // len(KINDS))
        document = recipe(base, checkpoints, seed, data)
        with opened(parse_recipe(document), RunOptions().open) as inputs:
            settings = inputs.recipe.router
            seeds = seed_set(inputs, RunOptions(quiet=True), "kind")
            assert settings is not None
            assert seeds is not None
            size = sum(shard.num_bytes for shard in inputs.shards(2**40))
            device = torch.device("cpu")
            started = time.process_time()
            outlook = look_ahead(inputs, seeds, settings, device, bytes_ours=size, quiet=True)
            took = time.process_time() - started
            found[str(count)] = {
                **outlook.worth.to_report(),
                "recipe": outlook.recipe,
                "cpu_seconds": took,
            }
            if count == max(SAMPLES):
                started = time.process_time()
                quick = has_fast_bfloat16()  # as `look_ahead` computes them
                checkpoint_losses(inputs, seeds, settings, device, quiet=True, quick=quick)
                found[str(count)]["cpu_seconds_of_losses"] = time.process_time() - started
    return {"verdicts": found}
