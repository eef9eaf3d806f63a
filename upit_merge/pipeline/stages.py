"""The stages of a pipeline: what each is made from, what it makes, how it is run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upit_merge.commands.compare import Rival
from upit_merge.commands.evaluate import EvaluateOptions, evaluate_output
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import load_recipe
from upit_merge.config.references import expand_models
from upit_merge.config.router import RouterSettings
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import is_adapter
from upit_merge.io.hub import OpenOptions, resolve, split_reference
from upit_merge.io.untrusted import read_json
from upit_merge.output.identity import file_states
from upit_merge.output.staging import whole_folder
from upit_merge.pipeline.config import Pipeline, write_yaml
from upit_merge.pipeline.dense_start import write_complete
from upit_merge.training.parent import VARIABLE, kill_with_parent
from upit_merge.training.settings import data_files

LOG = logging.getLogger(__name__)

_INTERRUPTED = 130  # the exit status of what Ctrl-C has ended


@dataclass(frozen=True)
class Stage:
    """A part of a pipeline.

    Attributes:
        name: What people call it.
        does: What it does, for people.
        product: What it makes: a folder, or a file.
        identity: What decides its result.
        run: Does it, given whether the same was begun before; goes on with that.
        besides: Other things it makes.
    """

    name: str
    does: str
    product: Path
    identity: Mapping[str, Any]
    run: Callable[[bool], None]
    besides: tuple[Path, ...] = field(default=())


def stages_of(pipeline: Pipeline, *, quiet: bool) -> list[Stage]:
    """Return all stages of a pipeline, in order."""
    config = pipeline.config
    stages = []
    if config.checkpoints is None:
        settings = pipeline.prepare_settings()
        does = "fine-tune the dense model"
        stages.append(_training_stage(pipeline, "prepare", settings, does, quiet=quiet))
    stages.append(_merge_stage(pipeline, quiet=quiet))
    if config.post_train is not None:
        settings = pipeline.post_train_settings()
        does = "train the mixture"
        stages.append(_training_stage(pipeline, "post_train", settings, does, quiet=quiet))
    if config.baseline:
        settings = pipeline.baseline_settings("the last checkpoint")
        does = "train the last checkpoint on the same tokens"
        stages.append(_training_stage(pipeline, "baseline", settings, does, quiet=quiet))
    if config.evaluate is not None:
        stages.append(_evaluate_stage(pipeline, quiet=quiet))
    return stages


def _training_stage(
    pipeline: Pipeline, name: str, settings: dict[str, Any], does: str, *, quiet: bool
) -> Stage:
    """Return a stage that `upit-merge finetune` does, in one process of its own or in several."""
    file = pipeline.out / f"{name}.yml"

    def run(_begun: bool) -> None:
        arguments = settings
        if name == "baseline":
            # The file is written when the model it names is whole. That one stays: training would
            # not go on from another, be it with the same weights.
            arguments = pipeline.baseline_settings(_dense_start(pipeline, made=file.is_file()))
        write_yaml(file, arguments)
        launcher = pipeline.launcher or [sys.executable]
        command = [*launcher, "-m", "upit_merge", "finetune", str(file)]
        print(f"$ upit-merge finetune {file}", flush=True)
        command += ["--quiet"] if quiet else []
        if status := _wait(command):
            raise UpitError(
                f"The stage {name} ended early (exit status {status}); see what it said above, "
                "then run the same command again, which goes on from there."
            )

    files = data_files(*(settings.get(key) for key in ("data", "datasets", "dataset_name")))
    shown = {key: value for key, value in settings.items() if key != "output_dir"}
    identity = {"settings": {name: shown}, "file": file_states(files, "")}
    besides = (file, pipeline.last) if name == "baseline" else (file,)
    return Stage(name, does, Path(settings["output_dir"]), identity, run, besides)


def _wait(command: list[str]) -> int:
    """Run a command that ends when this process does; return its exit status."""
    linux = sys.platform == "linux"
    try:
        process = subprocess.Popen(
            command,
            preexec_fn=kill_with_parent if linux else None,
            env={**os.environ, VARIABLE: "1"},
        )
    except OSError as error:
        raise UpitError(
            f"{command[0]} cannot be started ({error.strerror}); correct launch."
        ) from error
    interrupted = False
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the command got it too, and tidies up
            interrupted = True
            continue
        if interrupted or status == _INTERRUPTED:  # it has said so
            sys.exit(_INTERRUPTED)
        return status


def _last_checkpoint(pipeline: Pipeline) -> str:
    return expand_models(pipeline.parsed_recipe().models)[-1].model


def _dense_start(pipeline: Pipeline, *, made: bool) -> str:
    """Return the last checkpoint as a complete model; an adapter is added to the base, in a folder.

    Args:
        made: An earlier call has done so; else what is in that folder may be half a model.
    """
    base, adapter = split_reference(_complete(pipeline, _last_checkpoint(pipeline)))
    if adapter is None:
        return base
    if made and pipeline.last.is_dir():
        return str(pipeline.last)
    with whole_folder(pipeline.last) as draft:
        write_complete(f"{base}+{adapter}", draft)
    return str(pipeline.last)


def _merge_stage(pipeline: Pipeline, *, quiet: bool) -> Stage:
    """Return stages 2 and 3 of the paper as one: experts, then their router."""
    document = pipeline.recipe()
    file = pipeline.out / "recipe.yml"

    def run(begun: bool) -> None:
        if begun and (pipeline.merged / "config.json").is_file():
            return  # complete, but a kill came before it was recorded
        write_yaml(file, document)
        print(f"$ upit-merge run {file} {pipeline.merged}", flush=True)
        recipe, source = load_recipe(file)
        options = RunOptions(
            pipeline.config.device,
            trains_on=pipeline.config.post_train is not None,
            name=pipeline.out.absolute().name,
            overwrite=True,  # what is there is the pipeline's own
            quiet=quiet,
        )
        run_recipe(recipe, source, pipeline.merged, options)
        _free_device()

    recipe = pipeline.parsed_recipe()
    files: list[Path] = []
    if pipeline.config.checkpoints is not None:
        folders = (Path(entry.model) for entry in expand_models(recipe.models))
        files = [path for folder in folders for path in folder.glob("*.safetensors")]
    seed_data = recipe.router.data if recipe.router else ""
    identity = {"recipe": document, "file": file_states(files, seed_data)}
    does = "grow experts, train their router" if recipe.router else "grow experts"
    return Stage("merge", does, pipeline.merged, identity, run, (file,))


def _evaluate_stage(pipeline: Pipeline, *, quiet: bool) -> Stage:
    block, config = pipeline.config.evaluate, pipeline.config
    assert block is not None
    product = pipeline.out / "evaluation.json"
    sizes = block.model_dump(include={"sample", "max_length"}, exclude_none=True)
    settings = RouterSettings(data=block.data, **sizes)

    def run(_begun: bool) -> None:
        options = EvaluateOptions(
            group_by=block.group_by,
            json=product,
            card=True,
            against=_rivals(pipeline),
            seed=config.seed,
            device=config.device,
            quiet=quiet,
        )
        evaluate_output(pipeline.result, settings, options)
        _free_device()

    identity = {
        "evaluate": block.model_dump(mode="json"),
        "seed": config.seed,
        "what is measured": [pipeline.result.name, "and a baseline" * bool(config.baseline)],
        "file": file_states([], block.data),
    }
    return Stage("evaluate", "measure the result on held-out data", product, identity, run)


def _rivals(pipeline: Pipeline) -> tuple[Rival, ...]:
    """Return what is measured beside the result: its origins, and what else the tokens could do."""
    config = pipeline.config
    rivals = [
        Rival("base model", config.base_model),
        Rival("last checkpoint", _complete(pipeline, _last_checkpoint(pipeline))),
    ]
    if config.baseline:
        dense = max(pipeline.dense.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        start = str(pipeline.last) if pipeline.last.is_dir() else _last_checkpoint(pipeline)
        reference = f"{start}+{dense}" if is_adapter(dense) else str(dense)
        rivals.append(Rival("dense, same tokens", reference))
    if pipeline.result != pipeline.merged:
        rivals.append(Rival("mixture before post-training", str(pipeline.merged)))
    size = _vocabulary(str(pipeline.result))
    for rival in rivals:
        if _vocabulary(split_reference(rival.reference)[0]) != size:
            LOG.warning(
                "The %s has another vocabulary than the result, so it is not compared with.",
                rival.name,
            )
    return tuple(r for r in rivals if _vocabulary(split_reference(r.reference)[0]) == size)


def _vocabulary(reference: str) -> Any:
    folder = resolve(reference, OpenOptions(), role="model")
    return read_json(folder / "config.json", "the model").get("vocab_size")


def _complete(pipeline: Pipeline, checkpoint: str) -> str:
    """Return the reference of a checkpoint that may be an adapter of the base model."""
    return (
        f"{pipeline.config.base_model}+{checkpoint}" if is_adapter(Path(checkpoint)) else checkpoint
    )


def _free_device() -> None:
    """Give memory back: the next stage may be another process on the same GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
