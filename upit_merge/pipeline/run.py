"""`upit-merge pipeline`: runs the stages that are not done yet, in order."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from upit_merge.errors import UpitError, argument
from upit_merge.io.disk import explained_failures
from upit_merge.output.lock import exclusive
from upit_merge.pipeline.checks import check_pipeline
from upit_merge.pipeline.config import load_pipeline
from upit_merge.pipeline.record import Record
from upit_merge.pipeline.stages import Stage, stages_of
from upit_merge.report.next_steps import only_steps, tell_next
from upit_merge.report.tables import show
from upit_merge.runtime.processes import check_single_process


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
        UpitError: a mistake in the file, a stage that is done with other settings, an output
            folder that is not the pipeline's, or what a stage raises.
    """
    check_single_process("pipeline")
    pipeline = load_pipeline(path)
    check_pipeline(pipeline)
    stages = stages_of(pipeline, quiet=quiet)
    _check_names(stages, redo, until)
    with explained_failures(pipeline.out):
        pipeline.out.mkdir(parents=True, exist_ok=True)
        with exclusive(pipeline.out):
            record = Record(pipeline.out)
            _go_back(stages, record, redo)
            for number, stage in enumerate(stages, 1):
                done = record.is_done(stage.name, stage.identity)
                activity = "done" if done else stage.does
                print(f"[{number}/{len(stages)}] {stage.name}: {activity}", flush=True)
                if not done:
                    with only_steps():
                        _do(stage, record)
                if stage.name == until:
                    break
    if not quiet:
        show(_summary(stages, record))
    if until in (None, stages[-1].name):
        print(f"The model is in {pipeline.result}.")
    if until in (None, stages[-1].name) and not quiet:
        tell_next(("talk to it", f"upit-merge chat {argument(pipeline.result)}"))


def _do(stage: Stage, record: Record) -> None:
    """Run a stage; what it makes is recorded as ours before it is there."""
    begun = record.was_begun(stage.name, stage.identity)
    record.begin(stage.name, stage.identity)
    started = time.perf_counter()
    stage.run(begun)
    record.done(stage.name, stage.identity, time.perf_counter() - started)


def _go_back(stages: Sequence[Stage], record: Record, redo: str | None) -> None:
    """Remove what is to be done again: from `redo` on, or from what is not there any more.

    Raises:
        UpitError: before anything is removed, if a stage before that is done with other settings,
            or if something that a stage would make is there and not its own.
    """
    names = [stage.name for stage in stages]
    first = names.index(redo) if redo else len(stages)
    for number, stage in enumerate(stages[:first]):
        if not record.is_done(stage.name, stage.identity):
            first = number + 1  # it goes on itself; nothing after it can be right
            break
        if not stage.product.exists():
            first = number
            break
    for stage in stages:
        for path in (stage.product, *stage.besides):
            if path.exists() and not record.knows(stage.name):
                raise UpitError(
                    f"{path} is in the way of the stage {stage.name}, which did not make it; move "
                    "it, or choose another output folder."
                )
    for stage in stages[first:]:
        if record.knows(stage.name):
            for path in (stage.product, *stage.besides):
                _remove(path)
            record.forget(stage.name)


def _remove(path: Path) -> None:
    """Remove a file, or what is in a folder; a link to a folder on another disk stays."""
    if path.is_symlink() and path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_names(stages: Sequence[Stage], redo: str | None, until: str | None) -> None:
    known = [stage.name for stage in stages]
    for option, name in (("--redo", redo), ("--until", until)):
        if name is not None and name not in known:
            raise UpitError(f"{option} is {name}, but the stages are {', '.join(known)}.")


def _summary(stages: Sequence[Stage], record: Record) -> Table:
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "result"):
        table.add_column(column, overflow="fold")
    table.add_column("minutes", justify="right")
    for stage in stages:
        seconds = record.seconds(stage.name)
        cell = "" if seconds is None else f"{seconds / 60:.1f}"
        table.add_row(stage.name, str(stage.product), cell)
    return table
