"""Mistakes in a pipeline that can be found before its first stage begins, and hours later too."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upit_merge.config.references import expand_models
from upit_merge.data.examples import read_seed_data
from upit_merge.errors import UpitError, shown
from upit_merge.io.checkpoint import (
    PICKLED_WEIGHTS,
    SAFE_WEIGHTS,
    Checkpoint,
    has_any,
    is_adapter,
)
from upit_merge.io.hub import OpenOptions, resolve
from upit_merge.io.untrusted import read_json
from upit_merge.models.agreement import check_fits, own_settings
from upit_merge.models.dense import (
    carried_settings,
    dense_settings,
    family_of,
    ffn_modules,
    format_of,
    read_dense_config,
)
from upit_merge.models.tokenizer import has_tokenizer
from upit_merge.pipeline.config import Pipeline, write_yaml
from upit_merge.runtime.device import resolve_devices
from upit_merge.training.new_tokens import takes_template_of_model, vocabulary_with_template
from upit_merge.training.settings import FinetuneJob, load_job
from upit_merge.training.targets import resolve_targets_of


def check_pipeline(pipeline: Pipeline) -> None:
    """Look at the settings of all stages, the base model and the data.

    Raises:
        UpitError: the first mistake.
    """
    config = pipeline.config
    if pipeline.out.is_file():
        raise UpitError(f"{pipeline.source}: output is {pipeline.out}, a file; name a folder.")
    resolve_devices(config.device)
    configurations, ffn = _check_base(pipeline)
    router = pipeline.parsed_recipe().router
    if router is not None and router.data is not None:
        column = router.column
        read_seed_data(router.data, split=router.split, config=router.subset, column=column)
    if config.evaluate is not None:
        read_seed_data(config.evaluate.data, column=config.evaluate.group_by)
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in _training_blocks(pipeline).items():
            file, config = Path(folder) / f"{name}.yml", configurations[name]
            _check_training(pipeline, name, settings, file, config, ffn)


def _check_base(pipeline: Pipeline) -> tuple[dict[str, Any], list[str]]:
    """Open the base as the merge will, which reads no pickles.

    Returns:
        transformers' configuration of the model that each training begins with; a mixture's has
        not its number of experts. And what the modules of the base's FFNs are called.
    """
    reference = pipeline.config.base_model
    folder = resolve(reference, OpenOptions(), role="base model")
    if has_any(folder, PICKLED_WEIGHTS) and not has_any(folder, SAFE_WEIGHTS):
        raise UpitError(
            f"{pipeline.source}: base_model is {shown(reference)}, whose weights are in .bin "
            "files, which a pipeline does not read; convert it to safetensors."
        )
    with contextlib.closing(Checkpoint(reference, folder, OpenOptions())) as base:
        dense, ffn = read_dense_config(base), ffn_modules(base)
        recipe = pipeline.parsed_recipe()
        form, parameters = format_of(base, recipe.architecture), recipe.parameters
        own = {"shared": parameters.shared, "dense_layers": parameters.dense_layers}
        settings = dense_settings(base)
        settings |= own_settings(form, own, settings, family_of(base).targets)
        check_fits(base, form, settings)
    fields = form.fields(settings, form.fewest_experts) | form.rope_fields(settings)
    mixture = form.read(
        form.document({"model_type": form.name, **fields, **carried_settings(dense)})
    )
    return {"prepare": dense, "baseline": dense, "post_train": mixture}, ffn


def _training_blocks(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    config, blocks = pipeline.config, {}
    if config.checkpoints is None:
        blocks["prepare"] = pipeline.prepare_settings()
    if config.post_train is not None:
        blocks["post_train"] = pipeline.post_train_settings()
    if config.baseline:
        blocks["baseline"] = pipeline.baseline_settings("the last checkpoint")
    return blocks


def _check_training(
    pipeline: Pipeline,
    name: str,
    settings: dict[str, Any],
    file: Path,
    config: Any,
    ffn: Sequence[str],
) -> None:
    write_yaml(file, settings)
    where = f"{pipeline.source}: {name}"
    try:
        job = load_job(file)
    except UpitError as error:  # the file it names is not one the user knows
        raise UpitError(error.message.replace(str(file), where)) from None
    if name != "post_train" and job.extra.train_modules == "router":
        raise UpitError(
            f"{where}: train_modules is router, but a dense model has none; write {name}: "
            "{train_modules: ffn}."
        )
    modules = job.model.lora_target_modules
    if (
        name == "prepare"
        and job.model.use_peft
        and isinstance(modules, list)
        and not {module.rpartition(".")[2] for module in modules} & {*ffn}
    ):
        raise UpitError(
            f"{where}: lora_target_modules has no part of the FFN, which becomes the expert; add "
            f"{', '.join(ffn)}."
        )
    try:
        resolve_targets_of(job.model, config)
    except UpitError as error:
        raise UpitError(f"{where}: {error.message}") from None
    if name == "post_train":
        _check_template(pipeline, job, where)


def _check_template(pipeline: Pipeline, job: FinetuneJob, where: str) -> None:
    """Refuse LoRA on a mixture with a chat template that brings tokens which that has not.

    After a preparation with the same template it has them.
    """
    template = job.training.chat_template_path
    if not job.model.use_peft or not takes_template_of_model(job.training):
        return
    start = resolve(pipeline.config.base_model, OpenOptions(), role="base model")
    if pipeline.config.checkpoints is None:
        if pipeline.prepare_settings().get("chat_template_path") == template:
            return
    else:
        start = Path(expand_models(pipeline.parsed_recipe().models)[-1].model)
    if is_adapter(start) or not has_tokenizer(start):
        return
    before = read_json(start / "config.json", "the model").get("vocab_size")
    after = vocabulary_with_template(start, template)
    if before != after:
        raise UpitError(
            f"{where}: chat_template_path is {shown(template)}, which makes a vocabulary of {after} "
            f"of one of {before}, and LoRA on a mixture cannot carry that; give prepare the same "
            "chat_template_path, or name a .jinja file."
        )
