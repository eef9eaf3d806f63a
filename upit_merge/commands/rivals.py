"""What one could have in a finished mixture's place, measured on the same samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit_merge.commands.preview import dense_models
from upit_merge.commands.session import RouterSession
from upit_merge.config.recipe import load_recipe
from upit_merge.engine.layerwise import MEAN
from upit_merge.errors import UpitError
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.models.formats import ffn_tensor
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report
from upit_merge.report.write import RECIPE_COPY
from upit_merge.router.blends import mergekit_recipe
from upit_merge.router.evaluation import run_expert
from upit_merge.router.rivals import dense_rivals, random_gates
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival, Worth

_AGAINST = "compare with them by --against MODEL"


@dataclass(frozen=True)
class Rivals:
    """Models beside a mixture.

    Attributes:
        models: Their losses on the samples.
        left_out: What could not be compared and what to do about it, in a sentence; or nothing.
        sources: The base, then the checkpoints, as mergekit is told of them; none if the models
            are made of the mixture's own experts.
        dtype: Of what is made of them.
    """

    models: list[Rival]
    left_out: str = ""
    sources: Sequence[str] = ()
    dtype: str = "bfloat16"

    def recipe(self, worth: Worth | None) -> str | None:
        """Return the mergekit recipe of what is to be used instead; None if nothing is, or has one."""
        if worth is None or worth.outcome != "not_worth" or not self.sources:
            return None
        if worth.advised is None or worth.advised not in self.models:
            return None
        base, *checkpoints = self.sources
        return mergekit_recipe(worth.advised, base, checkpoints, getattr(torch, self.dtype))

    def to_kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all of it as tensors and as what JSON has."""
        tensors = {f"rival-{number}": rival.sums for number, rival in enumerate(self.models)}
        told = [{"kind": r.kind, "name": r.name, "facts": dict(r.facts)} for r in self.models]
        facts = {"left_out": self.left_out, "sources": [*self.sources], "dtype": self.dtype}
        return tensors, {**facts, "models": told}

    @classmethod
    def of_kept(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Rivals:
        """Return what `to_kept` was given."""
        models = [
            Rival(told["kind"], told["name"], tensors[f"rival-{number}"], told["facts"])
            for number, told in enumerate(facts["models"])
        ]
        return cls(models, facts["left_out"], facts["sources"], facts["dtype"])


@dataclass(frozen=True)
class Sources:
    """The models that a mixture was made from, or why they are not to be had.

    Attributes:
        inputs: None if they are not.
        reason: Why, in a sentence.
    """

    inputs: Inputs | None
    reason: str = ""

    def files(self) -> list[Path]:
        """Return the files that decide what is made of them."""
        models = self.inputs.models if self.inputs else ()
        return [path for model in models for path in model.files()]


@contextlib.contextmanager
def opened_sources(session: RouterSession) -> Iterator[Sources]:
    """Open what a mixture was made from, if that is there and its experts are what it became.

    Adapters' and checkpoints' paths are those of its recipe.
    """
    out, report = session.edit.out, read_report(session.edit.out)
    if reason := _unlike_its_checkpoints(report):
        yield Sources(None, reason)
        return
    with contextlib.ExitStack() as stack:
        try:
            recipe, _text = load_recipe(out / RECIPE_COPY)
            inputs = stack.enter_context(
                opened(recipe.with_seed(report.seed), session.options.open)
            )
        except UpitError as error:
            reason = f"The models that it was made from could not be opened: {error.message}"
            yield Sources(None, f"{reason} Put them back, or {_AGAINST}.")
            return
        if inputs.labels != report.checkpoints or not _are_its_experts(session, inputs, report):
            reason = "The models under the names of its recipe are not those that it was made from"
            yield Sources(None, f"{reason}; put those back, or {_AGAINST}.")
            return
        yield Sources(inputs)


def _unlike_its_checkpoints(report: AnyReport) -> str:
    """Return why a mixture's checkpoints are no rivals of it; nothing if they may be."""
    if not report.document:
        return (
            "What it was made from is not known, as there is no report; compare with models of "
            "your own by --against MODEL."
        )
    if report.document.get("post_training"):
        return (
            "It was trained further, so that its checkpoints saw fewer tokens and are not "
            "compared; give a dense model that was trained on all of them by --against MODEL."
        )
    if report.extensions or report.lineage is None or not report.checkpoints:
        return f"Its experts are not of one run with this report; {_AGAINST}."
    return ""


def _own_experts(report: AnyReport) -> dict[int, int]:
    """Return the experts that are checkpoints as they were, by checkpoint."""
    found: dict[int, int] = {}
    if report.lineage is None or report.shrunk:
        return found
    for number, expert in enumerate(report.document["lineage"]["experts"]):
        weights = expert.get("weights")
        # One checkpoint, and of none of the others a part.
        if isinstance(weights, list) and sorted(map(float, weights), reverse=True)[:2] in (
            [1.0, 0.0],
            [1.0],
        ):
            found.setdefault(weights.index(1.0), number)
    return found


def _are_its_experts(session: RouterSession, inputs: Inputs, report: AnyReport) -> bool:
    """Return whether checkpoints are the experts they became, by one matrix of each."""
    architecture = inputs.architecture
    layer = architecture.mixture_layers[-1]
    name = ffn_tensor(layer, "down_proj")
    for checkpoint, expert in _own_experts(report).items():
        stored = session.moe.tensor(architecture.format.expert_tensor(layer, expert, "down_proj"))
        own = inputs.checkpoints[checkpoint].rows(name, 0, stored.shape[0])
        if own.shape != stored.shape or not torch.equal(own.to(stored.dtype), stored):
            return False
    return True


def measured_rivals(
    session: RouterSession, stage: RouterStage, sources: Sources, losses: SampleLosses | None
) -> Rivals:
    """Measure the dense models of the same checkpoints, and random gates.

    Where the checkpoints are not to be had these are made of the mixture's own experts: their
    average, and the best of them alone.

    Args:
        losses: Of the samples under the experts; None if single models are not asked for.

    Raises:
        UpitError: a loss is NaN or infinite.
    """
    inputs = sources.inputs
    if inputs is None:
        found = [*_of_experts(stage, losses), random_gates(stage, stage.everything)]
        return Rivals(found, sources.reason)
    report = read_report(session.edit.out)
    models = dense_models(inputs)
    own = (
        None
        if losses is None
        else _of_checkpoints(losses, _own_experts(report), len(inputs.labels))
    )
    found = dense_rivals(models, stage, own, random=True)
    dtype = str(inputs.dtype).removeprefix("torch.")
    return Rivals(found, "", [inputs.base.label, *inputs.labels], dtype)


def _of_checkpoints(losses: SampleLosses, experts: Mapping[int, int], count: int) -> SampleLosses:
    """Return losses by checkpoint instead of by expert, infinite where no expert is one."""
    samples = len(losses.counts)
    sums = torch.full((samples, count, 2), math.inf, dtype=torch.float64)
    for checkpoint, expert in experts.items():
        sums[:, checkpoint] = losses.sums[:, expert]
    return SampleLosses(sums, losses.counts, losses.told, losses.control)


def _of_experts(stage: RouterStage, losses: SampleLosses | None) -> Iterator[Rival]:
    if losses is not None:
        sums = losses.sums.sum(2)
        best = int(losses.means.mean(0).argmin())
        of_best = run_expert(stage, best) if losses.is_estimated else sums[:, best]
        yield Rival("single", f"expert {best} alone", of_best, {"expert": best})
    if stage.model.num_experts > 1:
        facts = {"experts": stage.model.num_experts}
        yield Rival("average", "the average of its experts", run_expert(stage, MEAN), facts)


def source_folders(session: RouterSession) -> list[Path]:
    """Return where the models lie that a mixture was made from; none if they are not to be had."""
    with opened_sources(session) as sources:
        return sorted({path.parent for path in sources.files()})
