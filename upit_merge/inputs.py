"""Everything a recipe refers to, opened and checked before any work starts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from upit_merge.architecture import (
    DenseArchitecture,
    default_dtype,
    inspect_models,
    moe_specs,
    stored_dtype,
)
from upit_merge.checkpoints import Checkpoint, OpenOptions, open_checkpoint
from upit_merge.errors import UpitError
from upit_merge.expansion.density import resolve_densities
from upit_merge.recipe import Recipe, expand_models
from upit_merge.shards import Shard, plan_shards
from upit_merge.tokenizer import (
    find_model,
    highest_token_id,
    resolve_chat_template,
    tokenizer_donor,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything a recipe refers to, opened and found to fit together."""

    recipe: Recipe
    base: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    architecture: DenseArchitecture
    densities: torch.Tensor
    backbone: tuple[Checkpoint, ...]
    tokenizer: Checkpoint | None
    dtype: torch.dtype
    num_experts: int
    experts_per_token: int
    chat_template: str | None

    @property
    def labels(self) -> list[str]:
        return [checkpoint.label for checkpoint in self.checkpoints]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The base, then the checkpoints."""
        return (self.base, *self.checkpoints)

    @property
    def settings_donor(self) -> Checkpoint:
        """Whose configuration the output carries: the last model the backbone comes from."""
        return self.backbone[-1]

    def shards(self, max_shard_bytes: int) -> tuple[Shard, ...]:
        return plan_shards(
            moe_specs(self.architecture, self.num_experts, self.dtype), max_shard_bytes
        )


@contextlib.contextmanager
def opened(recipe: Recipe, options: OpenOptions) -> Iterator[Inputs]:
    """Open and check every model of a recipe; closes them again."""
    entries = expand_models(recipe.models)
    with contextlib.ExitStack() as stack:

        def open_model(reference: str, role: str = "checkpoint") -> Checkpoint:
            return stack.enter_context(
                contextlib.closing(open_checkpoint(reference, options, role=role))
            )

        base = open_model(recipe.base_model, "base_model")
        checkpoints = tuple(open_model(entry.model) for entry in entries)
        architecture = inspect_models(base, checkpoints, recipe.architecture)
        num_experts = recipe.parameters.num_experts or len(checkpoints)
        experts_per_token = recipe.parameters.experts_per_token or min(2, num_experts)
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
        if recipe.output_dtype is None:
            _warn_of_mixed_dtypes(base, checkpoints, architecture)
        donor = tokenizer_donor(recipe.tokenizer_source, base, checkpoints)
        if recipe.router and donor is None:
            raise UpitError(
                "router: needs a tokenizer for its seed data, but no model of the recipe has one; "
                "put tokenizer.json into the last checkpoint's folder."
            )
        if donor:
            _warn_of_large_tokenizer(donor, architecture.settings["vocab_size"])
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
            backbone=_backbone(recipe.parameters.backbone, base, checkpoints),
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


def _warn_of_large_tokenizer(donor: Checkpoint, vocab_size: int) -> None:
    """Token ids without an embedding crash a model only when they occur."""
    if (highest := highest_token_id(donor.folder)) is not None and highest >= vocab_size:
        LOG.warning(
            "The tokenizer of %s has token ids up to %d, but the models have only %d embeddings; "
            "text with the further tokens will fail.",
            donor.label,
            highest,
            vocab_size,
        )


def _warn_of_mixed_dtypes(
    base: Checkpoint, checkpoints: Sequence[Checkpoint], architecture: DenseArchitecture
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


def _warn_of_repeats(base: Checkpoint, checkpoints: Sequence[Checkpoint], *, copies: bool) -> None:
    for checkpoint in checkpoints:
        # Upcycling is done to a pre-trained model as it is.
        if not copies and checkpoint.folder.resolve() == base.folder.resolve():
            LOG.warning(
                "The base %s is listed under models: too; it becomes an expert that was not "
                "fine-tuned, and a parent of others.",
                base.label,
            )
    folders = [checkpoint.folder.resolve() for checkpoint in checkpoints]
    for checkpoint, folder in zip(checkpoints, folders, strict=True):
        if folders.count(folder) > 1:
            LOG.warning(
                "Checkpoint %s is listed %d times; its copies become identical experts.",
                checkpoint.label,
                folders.count(folder),
            )
            return


def _backbone(
    setting: str, base: Checkpoint, checkpoints: tuple[Checkpoint, ...]
) -> tuple[Checkpoint, ...]:
    if setting == "last":
        return (checkpoints[-1],)
    if setting == "average":
        return checkpoints
    if setting == "base":
        return (base,)
    return (find_model(setting, "parameters.backbone", checkpoints, base),)
