"""What `upit-merge pipeline` is told, in one file, and what its stages are told in turn."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from upit_merge.config.explain import explain
from upit_merge.config.fields import Name, Strict
from upit_merge.config.recipe import METHOD, Recipe, parse_recipe
from upit_merge.config.yaml_file import load_mapping
from upit_merge.errors import UpitError, shown
from upit_merge.io.text_file import replace_text
from upit_merge.models.formats import PROJECTIONS
from upit_merge.training.settings import WARM_UP
from upit_merge.training.targets import dense_targets

# The paper's schedule: 2 epochs each, a checkpoint every quarter of an epoch.
_PREPARE = {"num_train_epochs": 2, "save_steps": 0.125}
# What a run that is cut off loses at most is a quarter of it; one checkpoint is enough to go on.
_POST_TRAIN = {
    "num_train_epochs": 2,
    "router_aux_loss_coef": 0.01,
    "save_steps": 0.25,
    "save_total_limit": 1,
    "warmup_steps": WARM_UP,
}
_DATA = ("data", "datasets", "dataset_name")  # the keys that say what a model is trained on
_FILLED_IN = ("model_name_or_path", "output_dir", "resume_from_checkpoint", "keep_checkpoints")


class EvaluateBlock(Strict):
    """`evaluate:`, what the result is measured on."""

    EXAMPLE: ClassVar[str] = "data: ./held-out.jsonl\ngroup_by: domain"

    data: Name = Field(description="Held-out samples, in the forms that a router's data has.")
    group_by: StrictStr | None = Field(None, description="Column with the kind of text.")
    sample: StrictInt | None = Field(None, ge=1, description="At most so many samples.")
    max_length: StrictInt | None = Field(
        None, ge=2, description="Tokens per sample; 512 if not given."
    )


class PipelineConfig(Strict):
    """A whole pipeline. Paths start from the folder the command is run in."""

    EXAMPLE: ClassVar[str] = """\
base_model: ./base
output: ./run
data: ./train.jsonl
merge:
  dtype: bfloat16
  parameters: {num_experts: 8}
router: {sample: 1000}
post_train: {learning_rate: 2.0e-5}
baseline: true
evaluate: {data: ./held-out.jsonl}
"""

    base_model: Name = Field(description="The pre-trained dense model: a folder or a Hub id.")
    output: Name = Field(description="Folder that receives everything.")
    data: Name | None = Field(
        None, description="Training data of both training stages; the router's samples too."
    )
    checkpoints: Name | None = Field(
        None, description="Checkpoints that are there, a glob of folders: nothing is prepared then."
    )
    prepare: Name | dict[str, Any] | None = Field(
        None,
        description="Stage 1, fine-tuning the dense model: keys of `upit-merge finetune`, or a "
        "file with them. By default 2 epochs with a checkpoint every quarter.",
    )
    merge: dict[str, Any] = Field(
        {}, description="Stage 2, a recipe without its models: dtype, parameters, …"
    )
    router: dict[str, Any] | None = Field(
        None,
        description="Stage 3, a recipe's `router:`; its data is the training data if not given.",
    )
    post_train: Name | dict[str, Any] | None = Field(
        None,
        description="Stage 4, training the mixture: keys of `upit-merge finetune`, or a file with "
        "them. By default 2 epochs with load balancing (0.01), and a warm-up over a tenth of the steps "
        "(`warmup_steps: 0.1`). Left out, there is no stage 4.",
    )
    baseline: StrictBool | dict[str, Any] = Field(
        False,
        description="Train the last checkpoint on the same tokens in the same way, to compare with "
        "(a mapping: with these keys instead of stage 4's).",
    )
    evaluate: EvaluateBlock | None = Field(None, description="What the result is measured on.")
    launch: StrictStr = Field(
        "", description="Starts the training stages, e.g. `accelerate launch --num_processes 2`."
    )
    device: StrictStr = Field(
        "cpu", description="Of merge, router and evaluation: cpu, cuda, auto."
    )
    seed: StrictInt = Field(
        0, ge=0, lt=2**32, description="Of all stages that do not set their own."
    )

    @model_validator(mode="after")
    def _complete(self) -> PipelineConfig:
        if self.checkpoints and self.prepare is not None:
            raise ValueError("checkpoints and prepare are both given; remove one of them")
        if self.baseline and self.post_train is None:
            raise ValueError("baseline has no meaning without post_train; remove it")
        try:
            shlex.split(self.launch)
        except ValueError as error:
            raise ValueError(f"launch is {self.launch!r}, which is no command: {error}") from None
        for key in ("merge_method", "base_model", "models", "router"):
            if key in self.merge:
                where = "at the top level" if key in ("base_model", "router") else "filled in"
                raise ValueError(f"merge: {key} is {where}; remove it there")
        return self


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that has been read, with the folders of its stages.

    Attributes:
        source: The file it was read from, for messages.
    """

    config: PipelineConfig
    source: Path

    @property
    def out(self) -> Path:
        return Path(os.path.expanduser(self.config.output))

    @property
    def prepared(self) -> Path:
        """Receives the checkpoints of stage 1."""
        return self.out / "prepare"

    @property
    def merged(self) -> Path:
        """The mixture after stages 2 and 3."""
        return self.out / "moe"

    @property
    def trained(self) -> Path:
        """The mixture after stage 4."""
        return self.out / "model"

    @property
    def dense(self) -> Path:
        """The dense model that is trained on the same tokens."""
        return self.out / "dense"

    @property
    def last(self) -> Path:
        """The last checkpoint made whole, for the dense model, if it is an adapter."""
        return self.out / "last"

    @property
    def result(self) -> Path:
        return self.merged if self.config.post_train is None else self.trained

    @property
    def checkpoints(self) -> str:
        """A glob of the checkpoints that become experts."""
        return self.config.checkpoints or f"{self.prepared}/checkpoint-*"

    @property
    def launcher(self) -> list[str]:
        """The words of `launch`."""
        return shlex.split(self.config.launch)

    def prepare_settings(self) -> dict[str, Any]:
        """Return stage 1, as `upit-merge finetune` takes it."""
        settings = self._training("prepare", self.config.prepare, _PREPARE)
        model = {"model_name_or_path": self.config.base_model, "output_dir": str(self.prepared)}
        return {**settings, **model}

    def post_train_settings(self) -> dict[str, Any]:
        """Return stage 4, likewise."""
        settings = self._training("post_train", self.config.post_train, _POST_TRAIN)
        model = {"model_name_or_path": str(self.merged), "output_dir": str(self.trained)}
        return {**settings, **model}

    def baseline_settings(self, checkpoint: str) -> dict[str, Any]:
        """Return the dense model's: as stage 4, but for what only a mixture has."""
        settings = self.post_train_settings()
        settings.pop("router_aux_loss_coef", None)
        if settings.pop("lora_target_parameters", None):  # experts; a dense model has modules
            named = settings.get("lora_target_modules") or []
            settings["lora_target_modules"] = [*named, *PROJECTIONS]
        if isinstance(settings.get("lora_target_modules"), list):
            settings["lora_target_modules"] = dense_targets(settings["lora_target_modules"])
        if isinstance(self.config.baseline, dict):
            settings |= self._block("baseline", self.config.baseline)
        return {**settings, "model_name_or_path": checkpoint, "output_dir": str(self.dense)}

    def recipe(self) -> dict[str, Any]:
        """Return stages 2 and 3, as `mergekit-yaml` takes them."""
        merge = dict(self.config.merge)
        parameters = {"seed": self.config.seed, **(merge.pop("parameters", None) or {})}
        document = {
            "merge_method": METHOD,
            "base_model": self.config.base_model,
            "models": [{"model": self.checkpoints}],
            **merge,
            "parameters": parameters,
        }
        if self.config.router is not None:
            given = {} if "prompts" in self.config.router else {"data": self.config.data}
            document["router"] = {**given, **self.config.router}
        return document

    def parsed_recipe(self) -> Recipe:
        """Return the recipe, checked."""
        return parse_recipe(self.recipe(), f"{self.source}: merge and router")

    def _training(
        self, name: str, block: str | dict[str, Any] | None, defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a training block with what it leaves open filled in."""
        settings = {**defaults, "seed": self.config.seed, **self._block(name, block)}
        if self.config.data and not any(settings.get(key) for key in _DATA):
            settings["data"] = self.config.data
        return settings

    def _block(self, name: str, block: str | dict[str, Any] | None) -> dict[str, Any]:
        """Return the keys of a training block, from the file if it names one."""
        settings = block or {}
        if isinstance(settings, str):
            settings = load_mapping(Path(os.path.expanduser(settings)), "training configuration")
            for key in _FILLED_IN:  # a configuration that is run by itself has them
                settings.pop(key, None)
        for key in _FILLED_IN:
            if key in settings:
                raise UpitError(
                    f"{self.source}: {name}.{key} is filled in by the pipeline; remove it."
                )
        return settings


def write_yaml(path: Path, document: Mapping[str, Any]) -> None:
    """Write settings for people to read, in the order they are in."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    replace_text(path, text)


def load_pipeline(path: Path) -> Pipeline:
    """Read a pipeline's file.

    Raises:
        UpitError: it cannot be read, or a key or value of it is not understood.
    """
    document = load_mapping(path, "pipeline")
    try:
        config = PipelineConfig.model_validate(document)
    except ValidationError as error:
        reason = explain(error, document, {"": PipelineConfig, "evaluate": EvaluateBlock})
        raise UpitError(f"{path}: {reason}.") from None
    trains = config.checkpoints is None or config.post_train is not None
    pipeline = Pipeline(config, path)
    if trains and config.data is None and not _name_their_data(pipeline):
        raise UpitError(f"{path}: data is missing; add the file with the training data.")
    if config.router is not None and not config.data and not {"data", "prompts"} & {*config.router}:
        raise UpitError(f"{path}: router.data is missing; add the file with its samples.")
    if config.device not in ("cpu", "auto") and not config.device.startswith("cuda"):
        raise UpitError(f"{path}: device is {shown(config.device)}, expected cpu, cuda or auto.")
    return pipeline


def _name_their_data(pipeline: Pipeline) -> bool:
    """Return whether every training stage says itself what it is trained on."""
    config = pipeline.config
    stages = [pipeline.prepare_settings()] if config.checkpoints is None else []
    stages += [pipeline.post_train_settings()] if config.post_train is not None else []
    return all(any(settings.get(key) for key in _DATA) for settings in stages)
