"""Everything a recipe refers to, opened and checked before any work starts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from upit_merge.config.recipe import Recipe
from upit_merge.config.references import expand_models
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions, resolve, split_reference
from upit_merge.io.shards import Shard, plan_shards
from upit_merge.io.sources import DenseModel
from upit_merge.merge.density import resolve_densities
from upit_merge.models.agreement import inspect_models
from upit_merge.models.chat_template import Borrowed, borrowed_templates, resolve_chat_template
from upit_merge.models.dense import (
    DenseArchitecture,
    as_llama,
    default_dtype,
    read_dense_config,
    stored_dtype,
)
from upit_merge.models.formats import is_shared
from upit_merge.models.lora.adapter import open_model, warn_of_unlike_adapters
from upit_merge.models.mixture import mixture_specs
from upit_merge.models.published import packed_specs
from upit_merge.models.tables import open_checkpoint
from upit_merge.models.tokenizer import check_loads, find_model, highest_token_id, tokenizer_donor
from upit_merge.models.views import split_ffn, stored_model

LOG = logging.getLogger(__name__)

# The folders that trainers name by the step.
_STEP = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Inputs:
    """Everything a recipe refers to, opened and found to fit together."""

    recipe: Recipe
    base: DenseModel
    checkpoints: tuple[DenseModel, ...]
    architecture: DenseArchitecture
    densities: torch.Tensor
    backbone: tuple[DenseModel, ...]
    shared: tuple[DenseModel, ...]
    tokenizer: DenseModel | None
    dtype: torch.dtype
    num_experts: int
    experts_per_token: int
    chat_template: str | None

    @property
    def labels(self) -> list[str]:
        return [checkpoint.label for checkpoint in self.checkpoints]

    @property
    def models(self) -> tuple[DenseModel, ...]:
        """The base, then the checkpoints."""
        return (self.base, *self.checkpoints)

    @property
    def latest_first(self) -> tuple[DenseModel, ...]:
        """Who is asked for what the tokenizer's donor has not: what was trained last knows best."""
        return (*reversed(self.checkpoints), self.base)

    @cached_property
    def borrowed(self) -> Borrowed | None:
        """Chat templates for a tokenizer that has none; None if it has, or the recipe gives one."""
        if self.tokenizer is None or self.chat_template:
            return None
        return borrowed_templates(self.tokenizer, self.latest_first)

    def donors(self, dense: str) -> tuple[DenseModel, ...]:
        """Return the models whose mean a tensor that is no expert's is, by its dense name."""
        return self.shared if is_shared(dense) else self.backbone

    @property
    def settings_donor(self) -> DenseModel:
        """Whose configuration the output carries: the last model the backbone comes from."""
        return self.backbone[-1]

    def shards(self, max_shard_bytes: int) -> tuple[Shard, ...]:
        groups = mixture_specs(self.architecture, self.num_experts, self.dtype)
        form = self.architecture.format
        return plan_shards([packed_specs(form, group) for group in groups], max_shard_bytes)


@contextlib.contextmanager
def opened(recipe: Recipe, options: OpenOptions) -> Iterator[Inputs]:
    """Open and check every model of a recipe; closes them again."""
    entries = expand_models(recipe.models)
    with contextlib.ExitStack() as stack:
        complete: dict[str, Checkpoint] = {}

        def open_complete(label: str, folder: Path) -> Checkpoint:
            """Adapters of one base share it, open once."""
            path = os.path.realpath(folder)
            if path not in complete:
                model = open_checkpoint(label, folder, options)
                complete[path] = stack.enter_context(contextlib.closing(model))
            return complete[path]

        def open_entry(reference: str) -> DenseModel:
            model = open_model(reference, stored_base, options, open_complete)
            return as_llama(stack.enter_context(contextlib.closing(model)))

        folder = _base_folder(recipe.base_model, options)
        stored_base = open_complete(recipe.base_model, folder)
        base = as_llama(stored_base)
        checkpoints = tuple(open_entry(entry.model) for entry in entries)
        parameters = recipe.parameters
        backbone = _donors(parameters.backbone, "parameters.backbone", base, checkpoints)
        own = {"shared": parameters.shared, "dense_layers": parameters.dense_layers}
        # Of copies around which somebody has put another model, nothing but the FFNs is read.
        own_backbone = parameters.backbone not in ("average", "last")
        only_ffn = parameters.expansion == "copy" and own_backbone
        architecture = inspect_models(
            base, checkpoints, backbone, recipe.architecture, own, only_ffn=only_ffn
        )
        shared_from = parameters.shared_from or "average"
        shared = _donors(shared_from, "parameters.shared_from", base, checkpoints)
        base = split_ffn(base, architecture.settings)
        checkpoints, backbone, shared = (
            tuple(split_ffn(model, architecture.settings) for model in models)
            for models in (checkpoints, backbone, shared)
        )
        _tell_of_own_heads(checkpoints)
        num_experts = recipe.parameters.num_experts or len(checkpoints)
        experts_per_token = recipe.parameters.experts_per_token or min(2, num_experts)
        form = architecture.format
        if num_experts < form.fewest_experts:
            raise UpitError(
                f"The recipe makes {num_experts} expert, but the router of a {form.title} needs "
                f"{form.fewest_experts}; raise num_experts."
            )
        if num_experts < experts_per_token:
            raise UpitError(
                f"The recipe makes {num_experts} experts but routes a token to "
                f"{experts_per_token}; lower experts_per_token or raise num_experts."
            )
        copies = recipe.parameters.expansion == "copy"
        if copies and num_experts < len(checkpoints):
            raise UpitError(
                f"The recipe copies {len(checkpoints)} checkpoints into {num_experts} experts, "
                "which leaves some out; raise num_experts or list fewer under models:."
            )
        _warn_of_repeats(base, checkpoints, copies=copies)
        if not copies:
            _warn_of_base_from_run(base, checkpoints)
        warn_of_unlike_adapters([*map(stored_model, checkpoints)])
        if recipe.output_dtype is None:
            _warn_of_mixed_dtypes(base, checkpoints, architecture)
        donor = tokenizer_donor(recipe.tokenizer_source, base, checkpoints)
        unfit = form.unfit_router(read_dense_config(backbone[-1]))
        if recipe.router and unfit:
            raise UpitError(
                f"Checkpoint {backbone[-1].label} {unfit}, so that the router cannot be trained "
                "layer by layer; leave router out, and train the output's gates with `upit-merge "
                "finetune` and train_modules: router."
            )
        if recipe.router and donor is None:
            raise UpitError(
                "router: needs a tokenizer for its seed data, but no model of the recipe has one; "
                "put tokenizer.json into the last checkpoint's folder."
            )
        if donor is base and recipe.tokenizer_source is None:
            _warn_of_lost_vocabularies(base, checkpoints)
        if donor:
            check_loads(donor.folder)
            _warn_of_large_tokenizer(donor, architecture.settings["vocab_size"], options)
        yield Inputs(
            recipe=recipe,
            base=base,
            checkpoints=checkpoints,
            architecture=architecture,
            densities=resolve_densities(
                architecture,
                recipe.parameters.density,
                [entry.parameters.density for entry in entries],
            ),
            backbone=backbone,
            shared=shared,
            tokenizer=donor,
            dtype=recipe.output_dtype or default_dtype(base, architecture),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            chat_template=(
                resolve_chat_template(recipe.chat_template, [*checkpoints, base])
                if recipe.chat_template
                else None
            ),
        )


def _base_folder(reference: str, options: OpenOptions) -> Path:
    model, adapter = split_reference(reference)
    if adapter is not None:
        raise UpitError(
            f"base_model: {reference} is an adapter on {model}, but deltas are measured against a "
            f"complete model; write base_model: {model}."
        )
    return resolve(reference, options, role="base_model")


def _warn_of_large_tokenizer(donor: DenseModel, vocab_size: int, options: OpenOptions) -> None:
    """Token ids without an embedding crash a model only when they occur."""
    highest = highest_token_id(donor.folder, trust_remote_code=options.trust_remote_code)
    if highest is not None and highest >= vocab_size:
        LOG.warning(
            "The tokenizer of %s has token ids up to %d, but the models have only %d embeddings; "
            "text with the further tokens will fail.",
            donor.label,
            highest,
            vocab_size,
        )


def _warn_of_mixed_dtypes(
    base: DenseModel, checkpoints: Sequence[DenseModel], architecture: DenseArchitecture
) -> None:
    """Arithmetic is float32 in any case, but the output's dtype should then be a choice."""
    expected = stored_dtype(base, architecture)
    for checkpoint in checkpoints:
        if (found := stored_dtype(checkpoint, architecture)) != expected:
            LOG.warning(
                "Checkpoint %s is stored in %s, the base in %s, and the output will be in %s; "
                "set dtype: in the recipe to choose.",
                checkpoint.label,
                *(str(d).removeprefix("torch.") for d in (found, expected)),
                str(default_dtype(base, architecture)).removeprefix("torch."),
            )
            return


def _warn_of_lost_vocabularies(base: DenseModel, checkpoints: Sequence[DenseModel]) -> None:
    """Say that checkpoints had a tokenizer, of which only the settings are there."""
    for checkpoint in reversed(checkpoints):
        if (checkpoint.folder / "tokenizer_config.json").is_file():
            LOG.warning(
                "Checkpoint %s has the settings of a tokenizer, but no vocabulary (tokenizer.json, "
                "or others); the output has the tokenizer of the base %s.",
                checkpoint.label,
                base.label,
            )
            return


def _tell_of_own_heads(checkpoints: Sequence[DenseModel]) -> None:
    """Say that the output is not tied, although the configuration of what it is made from says so."""
    stored = map(stored_model, checkpoints)
    models = [model for model in stored if isinstance(model, Checkpoint)]
    if falsely := next((model for model in models if model.is_falsely_tied), None):
        LOG.warning(
            "The config.json of checkpoint %s says tie_word_embeddings: true, but its lm_head.weight "
            "is not its embeddings; the output has both, and says false.",
            falsely.label,
        )


def _warn_of_base_from_run(base: DenseModel, checkpoints: Sequence[DenseModel]) -> None:
    """Say that the base may be one of the run's own checkpoints: deltas would then be wrong."""
    folder = Path(os.path.abspath(base.folder))
    beside = {Path(os.path.abspath(checkpoint.folder)).parent for checkpoint in checkpoints}
    if _STEP.fullmatch(folder.name) and folder.parent in beside:
        LOG.warning(
            "base_model: %s is named like a checkpoint of the run that is merged; give the model "
            "that the run began with.",
            base.label,
        )


def _warn_of_repeats(base: DenseModel, checkpoints: Sequence[DenseModel], *, copies: bool) -> None:
    for checkpoint in checkpoints:
        # Upcycling is done to a pre-trained model as it is.
        if not copies and checkpoint.folder.resolve() == base.folder.resolve():
            LOG.warning(
                "The base %s is listed under models: too; it becomes an expert that was not "
                "fine-tuned, and a parent of others.",
                base.label,
            )
    sources = [{path.resolve() for path in checkpoint.files()} for checkpoint in checkpoints]
    for checkpoint, files in zip(checkpoints, sources, strict=True):
        if sources.count(files) > 1:
            LOG.warning(
                "Checkpoint %s is listed %d times; its copies become identical experts.",
                checkpoint.label,
                sources.count(files),
            )
            return


def _donors(
    setting: str, key: str, base: DenseModel, checkpoints: tuple[DenseModel, ...]
) -> tuple[DenseModel, ...]:
    """Return the models whose mean a part of the mixture that is no expert is."""
    if setting == "last":
        return (checkpoints[-1],)
    if setting == "average":
        return checkpoints
    if setting == "base":
        return (base,)
    return (find_model(setting, key, checkpoints, base),)
