"""What one could have in a finished mixture's place, measured on the same samples."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit_merge.commands.finished import result_digest
from upit_merge.commands.preview import PlannedMixture, dense_models
from upit_merge.commands.session import RouterSession
from upit_merge.config.recipe import load_recipe
from upit_merge.engine.layerwise import MEAN
from upit_merge.errors import UpitError
from upit_merge.io.same import have_same_tensors
from upit_merge.io.sources import TensorSource
from upit_merge.io.untrusted import own_file
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.merge.passes import measure_similarity
from upit_merge.models.lora.adapter import Adapter
from upit_merge.models.views import stored_model
from upit_merge.output.identity import file_states
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report
from upit_merge.report.sources import told_apart
from upit_merge.report.write import RECIPE_COPY
from upit_merge.router.evaluation import run_expert
from upit_merge.router.mergekit_models import MergekitModels, has_recipe, mergekit_recipe
from upit_merge.router.rivals import dense_rivals, random_gates
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival, Worth
from upit_merge.runtime.device import resolve_devices

LOG = logging.getLogger(__name__)

_AGAINST = "compare with models that could be made instead by --against MODEL"
_NOT_HERE = (
    "The models that it was made from cannot be opened here, so that no sum of their deltas was "
    f"compared; put them where its recipe says, or {_AGAINST}."
)
_OTHERS = (
    "The models under the names of its recipe are not those that it was made from, so that no sum "
    f"of their deltas was compared; put those back, or {_AGAINST}."
)
# By what share of the largest entry sums of differently ordered products may differ; a report has
# ten digits of them.
_SAME_GRAM = 1e-6
# The same of entries of an adapter's tensors, in float32.
_SAME_PRODUCTS = 1e-6


@dataclass(frozen=True)
class Rivals:
    """Models beside a mixture.

    Attributes:
        models: Their losses on the samples.
        left_out: What could not be compared and what to do about it, in a sentence; or nothing.
        sources: What they are made of, as mergekit is told of it; None if that is the mixture's
            own experts.
        dtype: Of what is made of them.
    """

    models: list[Rival]
    left_out: str = ""
    sources: MergekitModels | None = None
    dtype: str = "bfloat16"

    def recipe(self, worth: Worth | None) -> str | None:
        """Return the mergekit recipe of what is to be used instead; None if nothing is, or has one."""
        advised = self._advised(worth)
        if advised is None or self.sources is None:
            return None
        return mergekit_recipe(advised, self.sources, getattr(torch, self.dtype))

    def no_recipe(self, worth: Worth | None) -> str:
        """Return why mergekit cannot make what is to be used instead, in a sentence; or nothing."""
        advised = self._advised(worth)
        if advised is None or self.sources is None or not has_recipe(advised):
            return ""
        return self.sources.unfit

    def _advised(self, worth: Worth | None) -> Rival | None:
        if worth is None or worth.outcome != "not_worth" or worth.advised not in self.models:
            return None
        return worth.advised

    def to_kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all of it as tensors and as what JSON has."""
        tensors = {f"rival-{number}": rival.sums for number, rival in enumerate(self.models)}
        told = [{"kind": r.kind, "name": r.name, "facts": dict(r.facts)} for r in self.models]
        sources = None if self.sources is None else asdict(self.sources)
        facts = {"left_out": self.left_out, "sources": sources, "dtype": self.dtype}
        return tensors, {**facts, "models": told}

    @classmethod
    def of_kept(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Rivals:
        """Return what `to_kept` was given."""
        models = [
            Rival(told["kind"], told["name"], tensors[f"rival-{number}"], told["facts"])
            for number, told in enumerate(facts["models"])
        ]
        sources = None if facts["sources"] is None else MergekitModels(**facts["sources"])
        return cls(models, facts["left_out"], sources, facts["dtype"])


@dataclass(frozen=True)
class Sources:
    """The models that a mixture was made from, or why they are not to be had.

    Attributes:
        inputs: None if they are not.
        reason: Why, in a sentence that names nothing of anybody's disk: it goes on the card.
        detail: What else is to be said of it on the terminal.
    """

    inputs: Inputs | None
    reason: str = ""
    detail: str = ""

    def files(self) -> list[Path]:
        """Return the files that decide what is made of them."""
        models = self.inputs.models if self.inputs else ()
        return [path for model in models for path in model.files()]


@contextlib.contextmanager
def opened_sources(session: RouterSession) -> Iterator[Sources]:
    """Open what a mixture was made from, if that is on this machine; nothing is downloaded.

    Adapters' and checkpoints' paths are those of its recipe. Whether they are still what they were
    is found out before anything is measured of them, see `measured_rivals`.
    """
    out, report = session.edit.out, read_report(session.edit.out)
    if reason := _unlike_its_checkpoints(report):
        yield Sources(None, reason)
        return
    with contextlib.ExitStack() as stack:
        try:
            recipe, _text = load_recipe(own_file(out / RECIPE_COPY, out))
            # The recipe may be a stranger's, who must not choose what this machine downloads.
            local = replace(session.options.open, local=True)
            inputs = stack.enter_context(opened(recipe.with_seed(report.seed), local))
        except UpitError as error:
            yield Sources(None, _NOT_HERE, error.message)
            return
        yield Sources(inputs) if inputs.labels == report.checkpoints else Sources(None, _OTHERS)


def _unlike_its_checkpoints(report: AnyReport) -> str:
    """Return why a mixture's checkpoints are no rivals of it; nothing if they may be."""
    if not report.document:
        return (
            "What it was made from is not known, as there is no report; compare with models of "
            "your own by --against MODEL."
        )
    trained = report.router is not None and report.router.experts_sha256
    if report.document.get("post_training") or trained:
        return (
            f"{'Its experts were' if trained else 'It was'} trained further, so that its "
            "checkpoints saw fewer tokens and are not compared; give a dense model that was "
            "trained on all of them by --against MODEL."
        )
    if report.extensions:
        return (
            "An expert was added to it later, so that its checkpoints are not all that it was "
            f"made from; {_AGAINST}."
        )
    if report.lineage is None or not report.checkpoints:
        return f"Its report does not say which checkpoints it was made from; {_AGAINST}."
    return ""


def _has_random_gates(report: AnyReport) -> bool:
    """Return whether the mixture's own gates are random: others are then nothing to compare with."""
    if not report.document or report.document.get("post_training") or report.extensions:
        return False
    return report.router is None or report.router.settings.get("objective") == "random"


def _are_unchanged(session: RouterSession, inputs: Inputs, report: AnyReport) -> bool:
    """Return whether base and checkpoints are what they were when the mixture was made.

    If their files' times and sizes are not those that the report has a digest of, two things decide:
    the likeness of the checkpoints' deltas, which depends on every FFN weight of all of them, and
    whether the mixture's backbone is what its donors give now. Attention, norms and embeddings of
    checkpoints that gave nothing to the backbone are nowhere to be compared with: those are
    believed.
    """
    made = report.document.get("run")
    data = inputs.recipe.router.data if inputs.recipe.router else ""
    files = [path for model in inputs.models for path in model.files()]
    if isinstance(made, dict) and made.get("file") == result_digest(
        {"file": file_states(files, data)}
    ):
        return True
    count = len(inputs.checkpoints)
    try:
        before = torch.tensor(report.document.get("checkpoint_gram"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # a report may say anything
        return False
    if before.shape != (count, count) or not _have_its_backbone(session.moe, inputs):
        return False
    devices = resolve_devices(session.options.device)
    quiet = session.options.quiet or not session.edit.processes.is_first
    now = measure_similarity(inputs, devices, quiet=quiet).sum(0)
    return torch.allclose(now, before, rtol=_SAME_GRAM, atol=_SAME_GRAM * float(before.abs().max()))


def _have_its_backbone(moe: TensorSource, inputs: Inputs) -> bool:
    """Return whether a merge would write the backbone that the mixture has.

    To the byte, but for the products of an adapter's factors, which may differ in their last bits
    from machine to machine.
    """
    planned, architecture = PlannedMixture(inputs), inputs.architecture
    ffn = {name for _layer, _projection, name in architecture.ffn_names()}
    products = {
        own: any(isinstance(stored_model(donor), Adapter) for donor in inputs.donors(dense))
        for dense in architecture.specs.keys() - ffn
        for own in architecture.format.outputs_of(dense, architecture.settings)
    }

    def agree(name: str, ours: Tensor, theirs: Tensor) -> bool:
        return torch.equal(ours, theirs) or (products[name] and _are_close(ours, theirs))

    known = products.keys() <= moe.specs.keys()
    return known and have_same_tensors(moe, [planned], products, agree)


def _are_close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether tensors are equal but for how their last bits were rounded."""
    share, size = torch.finfo(ours.dtype).eps, float(ours.abs().max())
    return torch.allclose(ours.float(), theirs.float(), rtol=share, atol=_SAME_PRODUCTS * size)


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
    inputs, processes = sources.inputs, stage.processes
    report = read_report(session.edit.out)
    random = not _has_random_gates(report)
    reason = sources.reason
    if inputs is not None:
        same = _are_unchanged(session, inputs, report) if processes.is_first else False
        if not processes.gather(same)[0]:
            inputs, reason = None, _OTHERS
    if inputs is None:
        if sources.detail and processes.is_first:
            LOG.info("%s", sources.detail)
        found = [*_of_experts(stage, losses)]
        found += [random_gates(stage, stage.everything)] if random else []
        return Rivals(found, reason)
    models = dense_models(inputs)
    own = (
        None
        if losses is None
        else _of_checkpoints(losses, _own_experts(report), len(inputs.labels))
    )
    found = dense_rivals(models, stage, own, random=random)
    dtype = str(inputs.dtype).removeprefix("torch.")
    names = told_apart(inputs.labels)
    told = [_told(rival, names) for rival in found]
    return Rivals(told, "", MergekitModels.of(inputs.base, inputs.checkpoints), dtype)


def _told(rival: Rival, names: Sequence[str]) -> Rival:
    """Return a rival as it may be named on a card: a checkpoint as the card's table of experts does."""
    if rival.kind != "single":
        return rival
    number = int(rival.facts["checkpoint"])
    return replace(rival, name=f"checkpoint {number} ({names[number]})")


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
