"""What `upit-merge init` takes for a recipe, of what lies in a folder, if nobody says otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upit_merge.commands.first_recipe.survey import FoundModel, Survey
from upit_merge.config.recipe import ModelEntry
from upit_merge.config.references import expand_models
from upit_merge.errors import UpitError, counted, one_line
from upit_merge.io.hub import is_folder, looks_like_path
from upit_merge.io.language_part import language_settings
from upit_merge.io.leavings import GGUF, without_four_bits

_BASE_NAME = re.compile(r"(^|[-_. ])(base|pre-?trained|foundation)([-_. ]|$)", re.IGNORECASE)
# What people call what they have trained.
_RESULT_NAME = re.compile(r"final|merged|best|last|latest|output|result|sft|tuned", re.IGNORECASE)
_HUB_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)(?:[/\\]|$)")
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size")

# A recipe makes so many experts of a run, and fewer of a few checkpoints.
_EXPERTS, _FEW = 8, 4


@dataclass
class RecipeChoices:
    """What a recipe will say.

    Attributes:
        experts: The models that become experts, in order.
        left_out: By path, models that are not taken and why.
        base: The base; None if it must be asked for.
        base_told: Where that is from, in words.
        base_claim: What the checkpoints name as their base, if it is not here.
        base_dtype: Of a base that was found.
        data: Seed data; None for none.
        other_data: What it could be as well, if no name says which is meant.
        held_out: Data to measure with, by its name.
    """

    experts: list[FoundModel] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    base: str | None = None
    base_told: str = ""
    base_claim: str | None = None
    base_dtype: str | None = None
    data: str | None = None
    other_data: list[str] = field(default_factory=list)
    held_out: str | None = None

    def take_base(self, reference: str) -> None:
        """Take somebody's word for the base, which is then no checkpoint."""
        if reference == self.base:
            return
        self.base, self.base_told = reference, ""
        place = os.path.realpath(os.path.expanduser(reference))
        self.experts = [m for m in self.experts if os.path.realpath(m.folder) != place]

    @property
    def entries(self) -> list[str]:
        """Of `models:`: a glob for each run, where it means just these."""
        return _entries(self.experts)

    @property
    def description(self) -> str:
        """The checkpoints in words."""
        adapters = sum(model.is_adapter for model in self.experts)
        kinds = []
        if complete := len(self.experts) - adapters:
            kinds.append(counted(complete, "complete model"))
        if adapters:
            kinds.append(counted(adapters, "LoRA adapter"))
        return " and ".join(kinds)

    @property
    def is_one_run(self) -> bool:
        """Whether the checkpoints are of one run, whose attention they share."""
        runs = {model.folder.parent for model in self.experts}
        return len(runs) == 1 and all(model.step is not None for model in self.experts)

    @property
    def dtype(self) -> str | None:
        """Of the last complete checkpoint, or of the base of adapters, if it is known."""
        complete = [model for model in self.experts if not model.is_adapter]
        return _dtype_name(complete[-1]) if complete else self.base_dtype


def experts_for(count: int, *, is_one_run: bool) -> int:
    """Return how many experts to make: those of our recipes; of a few checkpoints not far more.

    Args:
        count: Of the checkpoints.
        is_one_run: Of models that were trained apart, each is an expert, and none is grown.
    """
    if not is_one_run:
        return count
    return _EXPERTS if count >= _FEW else _FEW


def choose(survey: Survey, beside: Sequence[FoundModel] = ()) -> RecipeChoices:
    """Tell base, checkpoints and data apart.

    Args:
        beside: Models beside the folder that are named like a base, see `is_named_base`.
    """
    choices = RecipeChoices(left_out=dict(survey.left_out))
    experts, others = _checkpoints(survey.models)
    base = _base(choices, experts, others, survey.models)
    if choices.base is None:
        alike = [m for m in beside if experts and all(_same_shape(m, e) for e in experts)]
        if len(alike) == 1:
            base = _taken(choices, alike[0], "by its name, beside the folder")
    if base is not None:
        choices.base_dtype = _dtype_name(base)
    choices.experts = experts or [model for model in others if model is not base]
    for model in others:
        if model is not base and model not in choices.experts:
            choices.left_out[model.reference] = _why_not(model, experts)
    _choose_data(choices, survey)
    return choices


def is_named_base(folder: Path) -> bool:
    """Whether people would take a folder for the base by its name."""
    return _BASE_NAME.search(folder.name) is not None


def _checkpoints(
    models: Sequence[FoundModel],
) -> tuple[list[FoundModel], list[FoundModel]]:
    """Return the checkpoints of runs, or else adapters; and the other models."""
    taken = [model for model in models if model.step is not None]
    taken = taken or [model for model in models if model.is_adapter]
    return taken, [model for model in models if model not in taken]


def _base(
    choices: RecipeChoices,
    experts: Sequence[FoundModel],
    others: Sequence[FoundModel],
    models: Sequence[FoundModel],
) -> FoundModel | None:
    """Find the base, and note it; return it if it is one of the models found."""
    above = {parent for model in experts for parent in model.folder.parents}
    possible = [m for m in others if not m.is_adapter and m.folder not in above]
    possible = [model for model in possible if all(_same_shape(model, e) for e in experts)]
    named = [model for model in possible if is_named_base(model.folder)]
    claims: dict[str, str] = {}
    for model in experts or models:
        if model.made_from is not None:
            claims.setdefault(_claimed(model.made_from), f"{model.told_by} of {model.reference}")
    for claim, told in claims.items():
        name = claim.rstrip("/").rpartition("/")[2].lower()
        same = [model for model in possible if model.folder.name.lower() == name]
        if len(same) == 1:
            return _taken(choices, same[0], f"{told} names it")
    if len(named) == 1:
        return _taken(choices, named[0], "by its name")
    known = {os.path.realpath(model.folder) for model in experts}
    for claim, told in claims.items():
        if os.path.realpath(os.path.expanduser(claim)) in known or not claim.isprintable():
            continue  # a run that was begun again names a checkpoint of its own
        if is_folder(claim) or not looks_like_path(claim):
            choices.base, choices.base_told = claim, f"{told} names it"
            return None
        choices.base_claim = f"{told} names {one_line(claim)}, which is not here"
    rest = [model for model in possible if not _RESULT_NAME.search(model.folder.name)]
    if experts and len(rest) == 1:
        return _taken(choices, rest[0], "the one model of this shape that is no checkpoint")
    return None


def _taken(choices: RecipeChoices, model: FoundModel, told: str) -> FoundModel:
    choices.base, choices.base_told = model.reference, told
    return model


def _claimed(reference: str) -> str:
    """Return the model that a reference in somebody's file means: a Hub id out of its cache."""
    if match := _HUB_CACHE.search(reference):
        return f"{match[1]}/{match[2]}"
    return without_four_bits(reference.strip())


def _same_shape(model: FoundModel, other: FoundModel) -> bool:
    if other.is_adapter:  # which says nothing of its base's shape
        return True
    one, two = language_settings(model.config), language_settings(other.config)
    return all(one.get(key) == two.get(key) for key in _SHAPE)


def _why_not(model: FoundModel, experts: Sequence[FoundModel]) -> str:
    if any(model.folder in expert.folder.parents for expert in experts):
        return f"{model.reference} is what its run ended with; its checkpoints are taken."
    return f"{model.reference} is not named like a checkpoint of a run; --model takes it too."


def nothing_found(folder: Path, survey: Survey, base: str | None) -> UpitError:
    """Return the sentence for a folder without checkpoints: what is in their place."""
    if survey.left_out:
        return UpitError(next(iter(survey.left_out.values())))
    if survey.ggufs:
        return GGUF.of("checkpoint", survey.ggufs[0], survey.ggufs[0])
    if base is not None or survey.models:
        found = base or survey.models[0].reference
        return UpitError(
            f"{folder} holds one model ({found}) and no checkpoints trained from it; give the "
            "folder in which your trainer saved them."
        )
    return UpitError(
        f"{folder} holds no checkpoints: no folder with model.safetensors or "
        "adapter_model.safetensors; give the folder in which your trainer saved them."
    )


def _entries(experts: Sequence[FoundModel]) -> list[str]:
    """Return the entries of `models:`: a glob for each run, where it means just these."""
    entries: list[str] = []
    # Of each run in step order, as they were found.
    runs: dict[Path, list[FoundModel]] = {}
    for model in experts:
        runs.setdefault(model.folder.parent, []).append(model)
    for run in runs.values():
        listed = [model.reference for model in run]
        parent = run[0].reference.rpartition("/")[0]
        pattern = f"{parent}/{re.sub(r'[0-9]+$', '', run[0].folder.name)}*"
        is_glob = len(run) > 1 and all(model.step is not None for model in run)
        if is_glob and _matched(pattern) == [os.path.normpath(name) for name in listed]:
            entries.append(pattern)
        else:
            entries += listed
    return entries


def _matched(pattern: str) -> list[str]:
    try:
        return [
            os.path.normpath(entry.model) for entry in expand_models([ModelEntry(model=pattern)])
        ]
    except UpitError:
        return []


def _dtype_name(model: FoundModel) -> str:
    name = str(model.dtype).removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "float32"


def _choose_data(choices: RecipeChoices, survey: Survey) -> None:
    usable = [data for data in survey.data if not data.is_held_out]
    measuring = [data.reference for data in survey.data if data.is_held_out]
    choices.held_out = measuring[0] if measuring else None
    if not usable:
        return
    best = usable[0]
    alike = [data for data in usable if (data.rank, data.depth) == (best.rank, best.depth)]
    choices.data = best.reference
    if len(alike) > 1:
        choices.other_data = [data.reference for data in alike]
