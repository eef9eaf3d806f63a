"""`upit-merge pipeline`: runs the stages that are not done yet, in order."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from upit_merge.checkpoints import OpenOptions, is_adapter, resolve
from upit_merge.errors import UpitError
from upit_merge.evaluating import EvaluateOptions, evaluate_output
from upit_merge.pipeline import RunOptions, run_recipe
from upit_merge.processes import refuse_company
from upit_merge.recipe import load_recipe
from upit_merge.references import expand_models
from upit_merge.report.tables import show
from upit_merge.resume import file_states
from upit_merge.rivals import Rival
from upit_merge.router.seed_data import read_seed_data
from upit_merge.router.settings import ByColumn, RouterSettings
from upit_merge.stages.children import dies_with_parent
from upit_merge.stages.config import Pipeline, load_pipeline, write_yaml
from upit_merge.stages.record import Record
from upit_merge.staging import explained_failures
from upit_merge.training.settings import load_job

LOG = logging.getLogger(__name__)

STAGES = ("prepare", "merge", "post_train", "baseline", "evaluate")


@dataclass(frozen=True)
class Stage:
    """A part of a pipeline.

    Attributes:
        name: One of `STAGES`.
        does: What it does, for people.
        product: Is there when it is done.
        identity: What decides its result.
        run: Does it; goes on with what an earlier call has begun.
    """

    name: str
    does: str
    product: Path
    identity: Mapping[str, Any]
    run: Callable[[], None]


def run_pipeline(
    path: Path, *, redo: str | None = None, until: str | None = None, quiet: bool = False
) -> None:
    """Run the stages of a pipeline that are not done yet.

    A call that was cut off goes on where it was, in the midst of a stage too, and on the CPU ends
    with the same model.

    Args:
        path: YAML, see `config.PipelineConfig`.
        redo: Do this stage, and what follows it, again.
        until: The last stage to do.
        quiet: No progress bars, no tables.

    Raises:
        UpitError: a mistake in the file, a stage that is done with other settings, or what a
            stage raises.
    """
    refuse_company("pipeline")
    pipeline = load_pipeline(path)
    stages = _stages(pipeline, quiet=quiet)
    _check_names(stages, redo, until)
    with explained_failures(pipeline.out):
        record = Record(pipeline.out)
        _check_settings(pipeline)
        pipeline.out.mkdir(parents=True, exist_ok=True)
        if redo is not None:
            _forget(stages, record, redo)
        for number, stage in enumerate(stages, 1):
            done = record.is_done(stage.name, stage.identity) and stage.product.exists()
            state = "done" if done else stage.does
            print(f"[{number}/{len(stages)}] {stage.name}: {state}", flush=True)
            if not done:
                _forget(stages, record, stage.name, keep=stage.name)
                started = time.perf_counter()
                stage.run()
                record.done(stage.name, stage.identity, time.perf_counter() - started)
            if stage.name == until:
                break
    if not quiet:
        show(_summary(stages, record))
    if until in (None, stages[-1].name):
        print(f"The model is in {pipeline.result}.")


def _stages(pipeline: Pipeline, *, quiet: bool) -> list[Stage]:
    config = pipeline.config
    stages = []
    if config.checkpoints is None:
        settings = pipeline.prepare_settings()
        stages.append(
            _training_stage(pipeline, "prepare", settings, "fine-tune the dense model", quiet=quiet)
        )
    stages.append(_merge_stage(pipeline, quiet=quiet))
    if config.post_train is not None:
        settings = pipeline.post_train_settings()
        stages.append(
            _training_stage(pipeline, "post_train", settings, "train the mixture", quiet=quiet)
        )
    if config.baseline:
        settings = pipeline.baseline_settings("the last checkpoint")
        stages.append(
            _training_stage(
                pipeline,
                "baseline",
                settings,
                "train the last checkpoint on the same tokens",
                quiet=quiet,
            )
        )
    if config.evaluate is not None:
        stages.append(_evaluate_stage(pipeline, quiet=quiet))
    return stages


def _training_stage(
    pipeline: Pipeline, name: str, settings: dict[str, Any], does: str, *, quiet: bool
) -> Stage:
    """A stage that `upit-merge finetune` does, in a process of its own, or in several."""

    def run() -> None:
        given = settings
        if name == "baseline":
            given = pipeline.baseline_settings(_last_checkpoint(pipeline))
        file = pipeline.out / f"{name}.yml"
        write_yaml(file, given)
        launcher = pipeline.launcher or [sys.executable]
        command = [*launcher, "-m", "upit_merge", "finetune", str(file)]
        print(f"$ upit-merge finetune {file}", flush=True)
        command += ["--quiet"] if quiet else []
        if status := _wait(command):
            if status in (-2, 130):  # Ctrl-C: it has said so
                sys.exit(130)
            raise UpitError(
                f"The stage {name} ended early (exit status {status}); see what it said above, "
                "then run the same command again, which goes on from there."
            )

    data = str(settings.get("data") or "")
    shown = {key: value for key, value in settings.items() if key != "output_dir"}
    identity = {"settings": {name: shown}, "file": file_states([], data)}
    return Stage(name, does, Path(settings["output_dir"]), identity, run)


def _wait(command: list[str]) -> int:
    """Run a command that ends when this process does; its exit status."""
    try:
        process = subprocess.Popen(command, preexec_fn=dies_with_parent())
    except OSError as error:
        raise UpitError(
            f"{command[0]} cannot be started ({error.strerror}); correct launch."
        ) from error
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command got it too, and tidies up
            LOG.info("Waiting for %s to end.", command[0])


def _last_checkpoint(pipeline: Pipeline) -> str:
    return expand_models(pipeline.parsed_recipe().models)[-1].model


def _merge_stage(pipeline: Pipeline, *, quiet: bool) -> Stage:
    """Stages 2 and 3 of the paper: experts, then their router."""
    document = pipeline.recipe()

    def run() -> None:
        file = pipeline.out / "recipe.yml"
        write_yaml(file, document)
        print(f"$ upit-merge run {file} {pipeline.merged}", flush=True)
        recipe, source = load_recipe(file)
        name = pipeline.out.absolute().name
        options = RunOptions(pipeline.config.device, name=name, quiet=quiet)
        run_recipe(recipe, source, pipeline.merged, options)
        _free_device()

    recipe = pipeline.parsed_recipe()
    seed_data = recipe.router.data if recipe.router else ""
    identity = {"recipe": document, "file": file_states([], seed_data)}
    does = "grow experts, train their router" if recipe.router else "grow experts"
    return Stage("merge", does, pipeline.merged, identity, run)


def _evaluate_stage(pipeline: Pipeline, *, quiet: bool) -> Stage:
    block = pipeline.config.evaluate
    assert block is not None
    product = pipeline.out / "evaluation.json"
    settings = RouterSettings(
        data=block.data,
        **{k: v for k in ("sample", "max_length") if (v := getattr(block, k)) is not None},
    )

    def run() -> None:
        options = EvaluateOptions(
            group_by=block.group_by,
            json=product,
            card=True,
            against=_rivals(pipeline),
            seed=pipeline.config.seed,
            device=pipeline.config.device,
            quiet=quiet,
        )
        evaluate_output(pipeline.result, settings, options)
        _free_device()

    identity = {"evaluate": block.model_dump(mode="json"), "file": file_states([], block.data)}
    return Stage("evaluate", "measure the result on held-out data", product, identity, run)


def _rivals(pipeline: Pipeline) -> tuple[Rival, ...]:
    """What the result is measured beside: where it came from, and what else the tokens could do."""
    config = pipeline.config
    rivals = [
        Rival("base model", config.base_model),
        Rival("last checkpoint", _complete(pipeline, _last_checkpoint(pipeline))),
    ]
    if config.baseline:
        (dense,) = pipeline.dense.glob("checkpoint-*")
        rivals.append(Rival("dense, same tokens", _complete(pipeline, str(dense))))
    if pipeline.result != pipeline.merged:
        rivals.append(Rival("mixture before post-training", str(pipeline.merged)))
    return tuple(rivals)


def _complete(pipeline: Pipeline, checkpoint: str) -> str:
    """A checkpoint that may be an adapter of the base model."""
    return f"{pipeline.config.base_model}+{checkpoint}" * is_adapter(Path(checkpoint)) or checkpoint


def _free_device() -> None:
    """The next stage may be another process on the same GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_names(stages: list[Stage], redo: str | None, until: str | None) -> None:
    known = [stage.name for stage in stages]
    for option, name in (("--redo", redo), ("--until", until)):
        if name is not None and name not in known:
            raise UpitError(f"{option} is {name}, but the stages are {', '.join(known)}.")


def _check_settings(pipeline: Pipeline) -> None:
    """Find every mistake in the stages' settings and data before the first of them begins."""
    config, router = pipeline.config, pipeline.parsed_recipe().router
    resolve(config.base_model, OpenOptions(), role="base model")
    if router is not None:
        column = router.assign.column if isinstance(router.assign, ByColumn) else None
        read_seed_data(router.data, split=router.split, config=router.subset, column=column)
    if config.evaluate is not None:
        read_seed_data(config.evaluate.data, column=config.evaluate.group_by)
    blocks = {}
    if pipeline.config.checkpoints is None:
        blocks["prepare"] = pipeline.prepare_settings()
    if pipeline.config.post_train is not None:
        blocks["post_train"] = pipeline.post_train_settings()
    if pipeline.config.baseline:
        blocks["baseline"] = pipeline.baseline_settings("the last checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in blocks.items():
            file = Path(folder) / f"{name}.yml"
            write_yaml(file, settings)
            try:
                load_job(file)
            except UpitError as error:  # the file it names is not one the user knows
                told = error.message.replace(str(file), f"{pipeline.source}: {name}")
                raise UpitError(told) from None


def _forget(stages: list[Stage], record: Record, first: str, keep: str | None = None) -> None:
    """Remove what a stage and those after it have made.

    Args:
        keep: Of this stage, what was begun stays.
    """
    names = [stage.name for stage in stages]
    for stage in stages[names.index(first) :]:
        record.forget(stage.name)
        if stage.name == keep:
            continue
        if stage.product.is_dir():
            shutil.rmtree(stage.product)
        else:
            stage.product.unlink(missing_ok=True)


def _summary(stages: list[Stage], record: Record) -> Table:
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "result"):
        table.add_column(column, overflow="fold")
    table.add_column("minutes", justify="right")
    for stage in stages:
        seconds = record.seconds(stage.name)
        table.add_row(
            stage.name, str(stage.product), "" if seconds is None else f"{seconds / 60:.1f}"
        )
    return table
