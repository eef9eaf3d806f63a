"""What `upit-merge finetune` is told: the keys of `trl sft --config`, and a few of our own."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from upit_merge.config.yaml_file import load_mapping
from upit_merge.data.examples import EXTENSIONS, local_data
from upit_merge.errors import UpitError, first_line, one_line, shown
from upit_merge.training.quiet import quieten

# Share of a mixture's steps in which the learning rate rises, unless something else is asked for.
WARM_UP = 0.1


@dataclass
class FinetuneArguments:
    """Keys that `trl sft` does not have."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Training data, in the forms that a router's has: a jsonl, json, parquet, csv, "
            "tsv or txt file, a folder of them, or a dataset id (dataset_config, "
            "dataset_train_split)."
        },
    )
    train_modules: str = field(
        default="all",
        metadata={
            "help": "Which weights are trained: all; ffn, the FFNs alone (of a mixture its experts "
            "and its router); or router, its gates alone.",
            "choices": ["all", "ffn", "router"],
        },
    )
    keep_checkpoints: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the checkpoints when training is over. By default those of a dense "
            "model, which become experts, and not those of a mixture, which is written whole."
        },
    )


@dataclass(frozen=True)
class FinetuneJob:
    """Everything a training run is made from.

    Attributes:
        extra: The keys that are not TRL's.
        training: TRL's `SFTConfig`.
        model: TRL's `ModelConfig`: which model, and LoRA.
        data: TRL's `DatasetMixtureConfig`.
        script: TRL's `ScriptArguments`.
        given: The keys that the configuration or the command line has.
    """

    extra: FinetuneArguments
    training: Any
    model: Any
    data: Any
    script: Any
    given: frozenset[str] = frozenset()

    def warm_up(self) -> None:
        """Let the learning rate rise over the first steps, if nothing was said of that.

        For mixtures: from experts that fit each other, steps at the full rate lose what they know
        before the optimiser knows their gradients, and the end is worse for it (benchmarks/README.md,
        "Keeping the head start").
        """
        if "warmup_steps" not in self.given:
            self.training.warmup_steps = WARM_UP

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide what comes out, for a run that is cut off and goes on."""
        blocks = {"": self.extra, "model": self.model, "data": self.data, "script": self.script}
        identity = {name: dataclasses.asdict(block) for name, block in blocks.items()}
        settings = self.training.to_dict()
        identity["training"] = {key: settings[key] for key in settings if key not in _NO_MATTER}
        return identity


# Of SFTConfig: how a run is shown and where it goes, not what it computes.
_NO_MATTER = frozenset(
    [
        "output_dir",
        "logging_dir",
        "run_name",
        "report_to",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "resume_from_checkpoint",
        "local_rank",
        "push_to_hub",
        "dataset_num_proc",
        "dataloader_num_workers",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
    ]
)


def check_trl() -> None:
    """Refuse to train without TRL, which is an optional part of the installation.

    Raises:
        UpitError: saying how to install it.
    """
    try:
        import trl  # noqa: F401
    except ImportError:
        raise UpitError(
            'Training needs TRL, which is not installed; run `pip install "upit-merge[train]"`, or '
            '`pip install ".[train]"` in a clone.'
        ) from None


def load_job(path: Path, overrides: Sequence[str] = ()) -> FinetuneJob:
    """Read a training configuration.

    Args:
        path: YAML, with the keys of `trl sft --config` and those of `FinetuneArguments`.
        overrides: `--key value` pairs that win over the file.

    Raises:
        UpitError: the file cannot be read, or has a key or a value that is not understood.
    """
    check_trl()
    quieten()
    # TRL tells its makers of every run unless it is asked not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    document = load_mapping(path, "training configuration")
    blocks = (FinetuneArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, ScriptArguments)
    _check_unknown(document, blocks, path)
    on_cpu = document.get("use_cpu") is True or not torch.accelerator.is_available()
    if on_cpu and not {"bf16", "fp16"} & {*document}:
        # TRL's default, mixed precision, is for a GPU: on a CPU it is an error or slow.
        overrides = ["--bf16", "false", *overrides]
    if "loss_type" not in document:
        # The default of TRL below 1.15 replaces the mixture's forward, and its balance with it.
        overrides = ["--loss_type", "nll", *overrides]
    extra, training, model, data, script = _parsed(blocks, path, overrides)
    overridden = {option.partition("=")[0].replace("-", "_") for option in overrides}
    given = frozenset({*document, *(name.removeprefix("__") for name in overridden)})
    job = FinetuneJob(extra, training, model, data, script, given)
    modules = model.lora_target_modules
    if isinstance(modules, str) and modules != "all-linear":
        # TRL makes a text of a list of one, which PEFT then takes for a pattern of whole names.
        model.lora_target_modules = [modules]
    _check(job, path)
    if "output_dir" not in given:
        raise UpitError(f"{path}: output_dir is missing; add the folder that receives the result.")
    return job


def _check_unknown(document: dict[str, Any], blocks: Sequence[Any], path: Path) -> None:
    known = {field.name for block in blocks for field in dataclasses.fields(block)} | {"env"}
    for key in document:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see `trl sft --help` for TRL's"
        raise UpitError(f"{path}: unknown key {one_line(key)} ({hint}).")


def _parsed(blocks: Sequence[Any], path: Path, overrides: Sequence[str]) -> Any:
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise UpitError(f"{path}: {one_line(message)}; correct it.")

    try:
        return Parser(blocks).parse_args_and_config(["--config", str(path), *overrides])
    except (TypeError, ValueError, ImportError, KeyError) as error:
        if "bf16/gpu" in str(error):
            raise UpitError(
                f"{path}: bf16 is true, but there is no GPU here that computes in bfloat16; remove "
                "it, so that training is in float32, or add use_cpu: true, for bfloat16 on the CPU."
            ) from None
        raise UpitError(f"{path}: {one_line(first_line(error))}; correct it.") from None


def _check(job: FinetuneJob, path: Path) -> None:
    """Refuse what would come out as an obscure error much later."""
    extra, training, model = job.extra, job.training, job.model
    if not model.model_name_or_path:
        raise UpitError(f"{path}: model_name_or_path is missing; add the model to train.")
    if extra.train_modules not in ("all", "ffn", "router"):
        raise UpitError(
            f"{path}: train_modules is {shown(extra.train_modules)}, expected all, ffn or router."
        )
    if model.use_peft and extra.train_modules != "all":
        raise UpitError(
            f"{path}: train_modules: {extra.train_modules} has no meaning with use_peft, where "
            "lora_target_modules says what is trained; remove one of them."
        )
    if training.save_only_model:
        raise UpitError(
            f"{path}: save_only_model would keep a run that is cut off from going on; remove it "
            "(what is needed for that is removed when the training is over)."
        )
    if training.save_strategy == "no":
        raise UpitError(
            f"{path}: save_strategy is no, but checkpoints are the result of the training, or what "
            "it goes on from when it is cut off; remove it."
        )
    if training.eval_strategy != "no":
        raise UpitError(
            f"{path}: eval_strategy is {training.eval_strategy.value}, but there is no data for it "
            "here; remove it, and measure the result with `upit-merge evaluate`."
        )
    if model.model_revision != "main":
        raise UpitError(
            f"{path}: model_revision is a part of the name here; write model_name_or_path: "
            f"{one_line(model.model_name_or_path)}@{one_line(model.model_revision)}."
        )
    if job.data.streaming or job.script.dataset_streaming:
        raise UpitError(
            f"{path}: streaming has no meaning here, as a run that is cut off could not find its "
            "place again; remove it."
        )
    sources = [extra.data, job.script.dataset_name, *(job.data.datasets or [])]
    if not any(sources):
        raise UpitError(f"{path}: data is missing; add the file with the training data.")
    if extra.data and any(sources[1:]):
        raise UpitError(f"{path}: data and TRL's own dataset keys are both given; remove one.")
    if extra.data:
        _check_data(extra.data, path)


def data_files(data: str | None, datasets: Any, dataset_name: str | None) -> list[Path]:
    """Return the files on this machine that a model is trained on, as far as settings name them.

    Args:
        data: The key that is not TRL's.
        datasets: TRL's: mappings, or its `DatasetConfig`.
        dataset_name: TRL's.
    """
    named: list[Any] = [data, dataset_name]
    for source in datasets or []:
        values = source if isinstance(source, dict) else vars(source)
        files = values.get("data_files") or []
        files = list(files.values()) if isinstance(files, dict) else files
        folder = Path(values.get("data_dir") or "")
        named += [values.get("path"), values.get("data_dir")]
        for file in [files] if isinstance(files, str) else files:
            named += [file, str(folder / str(file))]
    files_on_disk: list[Path] = []
    for name in named:
        if not isinstance(name, str):
            continue
        for path in map(Path, glob.glob(os.path.expanduser(name), recursive=True)):
            files_on_disk += (
                [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            )
    return files_on_disk


def _check_data(data: str, path: Path) -> None:
    """Refuse what `data:` names if it is neither here nor the id of a dataset."""
    try:
        found = local_data(data)
    except UpitError:
        raise UpitError(
            f"{path}: data is {one_line(data)}, but there is no such file; correct the path."
        ) from None
    if found is not None and found.is_file() and found.suffix.lower() not in EXTENSIONS:
        raise UpitError(
            f"{path}: data is {one_line(data)}, expected a file that ends in "
            f"{', '.join(EXTENSIONS)}."
        )
