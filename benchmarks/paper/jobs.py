"""The jobs of benchmarks.paper: which there are, what each needs, and one job run.

Files, below the folder of a run: `settings.json`, `shared/corpus.json`, `shared/base/`,
`seed-S/stage1-…/checkpoint-N/`, and a result `…/results/JOB.json` for every finished job, written
last, so that a job that was killed is done again.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.paper.arms import ARMS, CHECKPOINTS, Arm, Stage1
from benchmarks.paper.data import Corpus, TuningData, load_corpus, mixed_epochs, tuning_data
from benchmarks.paper.measures import exact_match, parameters, perplexities, routing
from benchmarks.paper.scales import Scale
from benchmarks.paper.training import train, train_base, train_stage1
from benchmarks.perplexity import average_model
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.demo.training import save
from upit_merge.errors import UpitError
from upit_merge.io.text_file import write_json

BASE = "base"
SHARED = -1  # in place of a seed: what all of them start from
CORPUS = "corpus.json"
# Of post-training, where curves have points beside both ends.
CURVE = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75)
# A mixed visit has as many rows of every domain: three of four domains are elsewhere.
EVEN_REPLAY = 0.75

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One unit of work and its result file.

    Attributes:
        kind: `base`, a `Stage1`, or an `Arm`.
        rate: Instead of the scale's learning rate, for the sweep.
    """

    seed: int
    kind: str | Stage1 | Arm
    rate: float | None = None

    @property
    def name(self) -> str:
        name = self.kind if isinstance(self.kind, str) else self.kind.name
        return name if self.rate is None else f"{name}, rate {self.rate:g}"

    @property
    def label(self) -> str:
        return self.name if self.seed == SHARED else f"seed {self.seed}: {self.name}"

    def needs(self) -> list[Job]:
        """The jobs that must be done before."""
        if isinstance(self.kind, Stage1):
            return [Job(SHARED, BASE)]
        if isinstance(self.kind, Arm):
            return [Job(self.seed, self.kind.stage1)]
        return []

    def result_file(self, folder: Path) -> Path:
        return seed_folder(folder, self.seed) / "results" / f"{self.name}.json"

    def result(self, folder: Path) -> Result | None:
        """What was found, if the job is done."""
        path = self.result_file(folder)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / ("shared" if seed == SHARED else f"seed-{seed}")


def jobs_for(seeds: Sequence[int], arms: Sequence[Arm] = ARMS) -> list[Job]:
    """Everything that some arms need, in an order in which it can be done."""
    stages = list(dict.fromkeys(arm.stage1 for arm in arms))
    jobs = [Job(SHARED, BASE)]
    jobs += [Job(seed, stage) for stage in stages for seed in seeds]
    return jobs + [Job(seed, arm) for arm in arms for seed in seeds]


def claim_folder(folder: Path, scale: Scale) -> None:
    """Results of other settings must not be mixed with these.

    Raises:
        UpitError: the folder has results of other settings.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(scale.to_json()))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise UpitError(
                f"{folder} has results with another {changed[0]} ({found.get(changed[0])}, now "
                f"{settings[changed[0]]}); give a new folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def run_job(folder: Path, scale: Scale, job: Job, device: str) -> Result:
    """Do one job and write its result."""
    run = SeedRun(folder, scale, job.seed, device)
    started, cpu_started = time.perf_counter(), time.process_time()
    if isinstance(job.kind, Arm):
        result = run.arm(job.kind, job.rate)
    elif isinstance(job.kind, Stage1):
        result = run.stage1(job.kind)
    else:
        result = run.base()
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - cpu_started  # what other work does not change
    path = job.result_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


class SeedRun:
    """All that belongs to one seed."""

    def __init__(self, folder: Path, scale: Scale, seed: int, device: str) -> None:
        self.folder, self.shared = seed_folder(folder, seed), seed_folder(folder, SHARED)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scale, self.seed, self.device = scale, seed, device

    # ---- jobs

    def base(self) -> Result:
        corpus = load_corpus(self.scale.problems)
        _, seconds = train_base(self.shared, corpus, self.scale, self.device)
        write_json(self.shared / CORPUS, vars(corpus))  # to find it again takes several seconds
        return {"training": seconds}

    def stage1(self, stage: Stage1) -> Result:
        """Train it, and measure every checkpoint on every domain."""
        corpus = self.corpus()
        checkpoints, seconds = train_stage1(
            self.folder / stage.name,
            self.load(self.shared / BASE),
            self.tokenizer(),
            self.data(corpus, stage.share),
            self.scale,
            EVEN_REPLAY if stage.mixed else self.scale.replay,
            self.seed,
        )
        measured = [self.perplexities(self.load(path), corpus) for path in checkpoints]
        return {
            "domains": corpus.names,
            "checkpoints": measured,
            "training": seconds,
        }

    def arm(self, arm: Arm, rate: float | None) -> Result:
        """Build what it starts from, train it, measure it."""
        started = time.perf_counter()
        corpus = self.corpus()
        data = self.data(corpus, arm.stage1.share)
        model = self.start(arm, data)
        result: Result = {
            "domains": corpus.names,
            "parameters": parameters(model),
            "building": time.perf_counter() - started,
            "before": self.perplexities(model, corpus),
        }
        result |= self.post_trained(model, arm, rate, data, corpus)
        result["perplexity"] = self.perplexities(model, corpus)
        result["exact_match"] = exact_match(model, self.tokenizer(), corpus.problems)
        if arm.start == "moe":
            context = self.scale.context
            result["routing"] = routing(model, self.tokenizer(), corpus.heldout, context)
        return result

    def post_trained(
        self,
        model: PreTrainedModel,
        arm: Arm,
        rate: float | None,
        data: TuningData,
        corpus: Corpus,
    ) -> Result:
        """Train the model, in the order that all arms of a seed share.

        Returns:
            `training` (seconds), `tokens`, `rate`; and `curve`, perplexities on a part of the
            held-out text by share of the training done, if the arm asks for it.
        """
        if not arm.epochs:
            return {"training": 0.0, "tokens": 0}
        if rate is None:
            rates = self.scale.rates
            rate = rates.mixture if arm.start == "moe" else rates.dense
        curve: list[tuple[float, list[float]]] = []
        part = replace(
            corpus, heldout=[texts[:: self.scale.curve_every] for texts in corpus.heldout]
        )

        def look(step: int, steps: int) -> None:
            looked_at = {0, steps, *(max(1, round(share * steps)) for share in CURVE)}
            if arm.curve and step in looked_at:
                curve.append((step / steps, self.perplexities(model, part)))

        rows = mixed_epochs(data.rows, arm.epochs, torch.Generator().manual_seed(self.seed))
        look(0, len(rows))
        seconds = train(
            model,
            rows,
            self.scale.batch_size,
            arm.schedule.peaks(rate),
            balance=self.scale.balance,
            schedule=arm.schedule,
            after_step=look,
        )
        found: Result = {"training": seconds, "tokens": rows.numel(), "rate": rate}
        return {**found, "curve": curve} if arm.curve else found

    # ---- what arms start from

    def start(self, arm: Arm, data: TuningData) -> PreTrainedModel:
        """The model before post-training."""
        stage = self.folder / arm.stage1.name
        checkpoints = [stage / f"checkpoint-{number}" for number in CHECKPOINTS[arm.checkpoints]]
        if arm.start == "base":
            return self.load(self.shared / BASE)
        if arm.start == "last":
            return self.load(checkpoints[-1])
        if arm.start == "mean":
            return average_model(checkpoints).to(self.device)
        kept = self.folder / "mixtures" / arm.kept
        if arm.kept and kept.is_dir():
            return self.load(kept)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            if arm.of_mean:
                mean = Path(scratch) / "mean"
                checkpoints = [save(mean, average_model(checkpoints), self.tokenizer())]
            mixture = self.merged(arm, checkpoints, data, Path(scratch))
            model = self.load(mixture)
            if arm.kept:
                kept.parent.mkdir(exist_ok=True)
                with contextlib.suppress(OSError):  # another worker was first
                    mixture.rename(kept)
            return model

    def merged(
        self, arm: Arm, checkpoints: Sequence[Path], data: TuningData, scratch: Path
    ) -> Path:
        """Run the arm's recipe, as a user would."""
        document: dict[str, Any] = {
            "merge_method": "upit",
            "base_model": str(self.shared / BASE),
            "models": [{"model": str(path)} for path in checkpoints],
            "dtype": "float32",
            "parameters": {"seed": self.seed, **arm.parameters},
        }
        if arm.router is not None:
            seeds = scratch / "seed.jsonl"
            self.write_seed_samples(seeds, data)
            document["router"] = {"data": str(seeds), **arm.router}
        source = yaml.safe_dump(document, sort_keys=False)
        options = RunOptions(device=self.device, quiet=True)
        run_recipe(parse_recipe(document), source, scratch / "moe", options)
        return scratch / "moe"

    def write_seed_samples(self, path: Path, data: TuningData) -> None:
        """As many of every domain, of what the arm is trained on."""
        generator = random.Random(self.seed)
        with path.open("w", encoding="utf-8") as file:
            for texts in data.documents:
                count = min(self.scale.seed_samples, len(texts))
                for text in generator.sample(texts, count):
                    file.write(json.dumps({"text": text}) + "\n")

    # ---- what jobs share

    def corpus(self) -> Corpus:
        text = (self.shared / CORPUS).read_text(encoding="utf-8")
        return Corpus(**json.loads(text)).of_seed(self.seed)

    def data(self, corpus: Corpus, share: float) -> TuningData:
        rows = round(share * self.scale.rows_per_domain)
        return tuning_data(corpus, self.tokenizer(), self.scale.context, rows)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.shared / BASE)

    def load(self, path: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(path).to(self.device)
        if model.device.type == "cuda" and hasattr(model.config, "num_local_experts"):
            # Grouped products are for bfloat16 there; a loop over the experts takes float32 too.
            model.set_experts_implementation("eager")
        return model

    def perplexities(self, model: PreTrainedModel, corpus: Corpus) -> list[float]:
        return perplexities(model, self.tokenizer(), corpus.heldout, self.scale.context)
