"""How good a mixture is on held-out data, and what its router does there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.assembled import AssembledMixture, HandedCallback, RoutingCallback
from upit_merge.engine.hidden_states import Batch, PackedStates, Stream
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError, one_line
from upit_merge.io.tensor_file import equal_tensors
from upit_merge.models.formats import EMBEDDINGS, HEAD, PLAIN
from upit_merge.router.buckets import Buckets
from upit_merge.router.counts import DEAD_SHARE, RoutingCounts
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival, Worth

ALL = "all"  # the name of the group of all samples, unless a group has it


class Routing:
    """What the router did, counted sample by sample.

    Attributes:
        chosen: How many of a sample's tokens each expert was among the chosen for, float64,
            (num_samples, num_layers, num_experts).
        first: How many it was the first choice for.
        entropy: Sum over a sample's tokens of their routing probabilities' entropy, nats,
            (num_samples, num_layers).
    """

    def __init__(self, num_samples: int, num_layers: int, num_experts: int) -> None:
        shape = (num_samples, num_layers, num_experts)
        self.chosen, self.first = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.entropy = torch.zeros(shape[:2], dtype=torch.float64)

    def counter(self, samples: Sequence[TokenizedSample]) -> RoutingCallback:
        """Return what is to be told of every batch, see `AssembledMixture.sweep`."""

        def count(layer: int, batch: Batch, logits: Tensor, chosen: Tensor) -> None:
            lengths = torch.tensor([len(samples[index].input_ids) for index in batch])
            owner = torch.tensor(batch).repeat_interleave(lengths)
            probabilities = logits.softmax(1).double().cpu()
            entropies = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(1)
            chosen = chosen.cpu()
            hits = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
            top = torch.zeros_like(probabilities).scatter_(1, chosen[:, :1], 1.0)
            self.chosen[:, layer].index_add_(0, owner, hits)
            self.first[:, layer].index_add_(0, owner, top)
            self.entropy[:, layer].index_add_(0, owner, entropies)

        return count

    def summed(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up what several processes have counted."""
        for name in ("chosen", "first", "entropy"):
            setattr(self, name, total(getattr(self, name)))

    def counts(self, members: Sequence[int]) -> RoutingCounts:
        """Return what the router did with some samples."""
        rows = list(members)
        tokens = self.first[rows].sum((0, 2))
        return RoutingCounts(self.chosen[rows].sum(0), self.entropy[rows].sum(0), tokens)


@dataclass(frozen=True)
class Groups:
    """Samples by the value of a column, in order of appearance; and all of them.

    Attributes:
        members: Indices of the samples, by group; the last is of all samples, if there are several.
        whole: The name of that one.
    """

    members: dict[str, list[int]]
    whole: str = ALL

    @classmethod
    def of(cls, samples: Sequence[TokenizedSample]) -> Groups:
        members: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            if sample.label is not None:
                members.setdefault(one_line(str(sample.label)), []).append(index)
        whole = ALL
        while whole in members:
            whole = f"({whole})"
        if len(members) != 1:
            members[whole] = list(range(len(samples)))
        return cls(members, whole)

    @property
    def kinds(self) -> dict[str, list[int]]:
        """The kinds of text, without all of it."""
        return {name: rows for name, rows in self.members.items() if name != self.whole}


@dataclass(frozen=True)
class Evaluation:
    """A mixture on some samples.

    Attributes:
        samples: What it was evaluated on.
        groups: How they are told apart.
        sums: Negative log-likelihood in nats, summed over a sample's targets, (num_samples,).
        routing: What the router did.
        buckets: Which expert, as a dense model, predicts a sample best; None if not asked for.
        control: Like `sums`, with gates fitted to shuffled buckets.
        rivals: Models that one could have in the mixture's place.
        mixture_bytes, expert_bytes: What the mixture takes on disk, and one of its experts.
        dense_bytes: What a dense model of its checkpoints takes.
    """

    samples: Sequence[TokenizedSample]
    groups: Groups
    sums: Tensor
    routing: Routing
    buckets: Buckets | None = None
    control: Tensor | None = None
    rivals: Sequence[Rival] = ()
    mixture_bytes: int = 0
    expert_bytes: int = 0
    dense_bytes: int = 0

    @cached_property
    def worth(self) -> Worth | None:
        """Whether the mixture is worth its bytes; None if it was compared with nothing."""
        if not self.rivals:
            return None
        targets = [sample.num_targets for sample in self.samples]
        return Worth.of(
            self.sums,
            torch.tensor(targets, dtype=torch.float64),
            self.rivals,
            self.groups.kinds,
            bytes_ours=self.mixture_bytes,
            bytes_dense=self.dense_bytes,
            ours_kind="mixture",
        )

    def perplexity(self, members: Sequence[int], sums: Tensor | None = None) -> float:
        """Return exp of the mean over all target tokens of some samples."""
        targets = sum(self.samples[index].num_targets for index in members)
        total = (self.sums if sums is None else sums)[list(members)].sum()
        return math.exp(min(float(total) / targets, 700.0))

    def shares(self, members: Sequence[int]) -> Tensor:
        """Return every expert's share of the routed places, (num_layers, num_experts)."""
        return self.routing.counts(members).shares

    def dead(self) -> list[tuple[int, int]]:
        """Return (layer, expert) where an expert gets less than a tenth of an even share."""
        return self.routing.counts(range(len(self.samples))).dead()

    def hardly_used(self) -> list[int]:
        """Return the experts whose share, mean over the layers, is under a tenth of an even one."""
        shares = self.shares(range(len(self.samples))).mean(0)
        return (shares < DEAD_SHARE / len(shares)).nonzero().flatten().tolist()

    def agreement(self) -> dict[str, float] | None:
        """Measure how often the router's choice is the expert that predicts the sample best.

        `first`: share of tokens whose first choice it is; `chosen`: … that it is among the chosen
        of; `chance`: of `first`, if routing had nothing to do with the sample.
        """
        if self.buckets is None:
            return None
        own = self.buckets.assigned.view(-1, 1, 1).expand(-1, self.routing.first.shape[1], 1)
        tokens = self.routing.first.sum((0, 2))  # per layer
        lengths = self.routing.first[:, :1].sum(2)  # (samples, 1)
        shares = self.routing.first.sum(0) / tokens.unsqueeze(1)
        buckets = torch.zeros(shares.shape[1], dtype=torch.float64)
        buckets.index_add_(0, self.buckets.assigned, lengths.flatten())
        chance = shares @ (buckets / buckets.sum())
        return {
            "first": float((self.routing.first.gather(2, own).sum((0, 2)) / tokens).mean()),
            "chosen": float((self.routing.chosen.gather(2, own).sum((0, 2)) / tokens).mean()),
            "chance": float(chance.mean()),
        }

    @property
    def is_estimated(self) -> bool:
        """Whether the single experts' losses are not exact."""
        losses = None if self.buckets is None else self.buckets.losses
        return losses is not None and losses.is_estimated

    def entropy(self, members: Sequence[int]) -> dict[str, float]:
        """Return the entropies of a token's probabilities and of the shares, 0 … 1, see `RoutingCounts`."""
        return self.routing.counts(members).mean_entropy()

    def experts_alone(self, members: Sequence[int]) -> list[float] | None:
        """Return every expert's perplexity as a dense model; None if not asked for."""
        losses = None if self.buckets is None else self.buckets.losses
        if losses is None:
            return None
        sums = losses.sums.sum(2)
        return [self.perplexity(members, sums[:, expert]) for expert in range(sums.shape[1])]

    def group_report(self, members: Sequence[int]) -> dict[str, Any]:
        """Return all there is to say of a group, as plain numbers."""
        found: dict[str, Any] = {
            "samples": len(members),
            "targets": sum(self.samples[index].num_targets for index in members),
            "perplexity": self.perplexity(members),
            "entropy": self.entropy(members),
            "routing": self.shares(members).tolist(),
        }
        if (alone := self.experts_alone(members)) is not None:
            assert self.buckets is not None
            assert self.buckets.losses is not None
            best = self.buckets.losses.sums.sum(2).min(1).values
            found |= {
                "experts_alone": alone,
                "best_expert_per_sample": self.perplexity(members, best),
            }
        if self.control is not None:
            found["control_perplexity"] = self.perplexity(members, self.control)
        return found

    def to_report(self) -> dict[str, Any]:
        """Return the whole evaluation as plain numbers."""
        report: dict[str, Any] = {
            "groups": {name: self.group_report(m) for name, m in self.groups.members.items()},
            "dead": [{"layer": layer, "expert": expert} for layer, expert in self.dead()],
        }
        if (agreement := self.agreement()) is not None:
            assert self.buckets is not None
            report |= {"agreement": agreement, "buckets": self.buckets.to_report()}
        if idle := self.hardly_used():
            saved = len(idle) * self.expert_bytes
            report["hardly_used"] = {"experts": idle, "bytes": saved}
        if self.worth is not None:
            report["worth"] = self.worth.to_report()
        if others := [rival for rival in self.rivals if rival.kind == "other"]:
            report["others"] = [self._other_report(rival) for rival in others]
        return report

    def _other_report(self, rival: Rival) -> dict[str, Any]:
        assert self.worth is not None
        members, whole = self.groups.members, self.groups.whole
        found = {group: self.perplexity(m, rival.sums) for group, m in members.items()}
        gain = self.worth.gain(rival)
        return {
            "model": rival.name,
            "perplexity": found.pop(whole) if whole in found else next(iter(found.values())),
            "groups": found,
            "gain": gain.nats,
            "error": gain.error if math.isfinite(gain.error) else None,
            "samples": gain.samples,
        }


@contextlib.contextmanager
def swept(
    stage: RouterStage,
    on_routing: RoutingCallback,
    description: str,
    gates: Sequence[Tensor] | None = None,
    *,
    with_losses: bool = False,
    on_handed: HandedCallback | None = None,
) -> Iterator[tuple[PackedStates, Callable[[float], None]]]:
    """Push all samples through the assembled mixture.

    Gives the hidden states that come out, and what moves the bar by target tokens.

    Args:
        on_routing: Told what the router does.
        description: Of the progress bar.
        gates: Instead of the folder's, float32, (num_experts, hidden_size) per layer.
        with_losses: They are computed next, and belong to the bar's work.
        on_handed: Told what the experts are handed.
    """
    mixture = AssembledMixture(stage.model, gates)
    stream = stage.stream(0, stage.everything)
    effort = stage.effort
    work = stage.work(stream.samples, mixture=True, with_losses=with_losses)
    with stage.states([stream]) as states, stage.bar(work, description) as bar:
        mixture.sweep(
            stage.seeds.samples,
            stream.batches,
            states,
            on_routing=on_routing,
            on_progress=bar.part(effort.mixture),
            on_handed=on_handed,
        )
        yield states, bar.part(effort.head)


def run_mixture(
    stage: RouterStage, gates: Sequence[Tensor] | None = None
) -> tuple[Tensor, Routing]:
    """Push all samples through the assembled mixture.

    Args:
        gates: Instead of the folder's, float32, (num_experts, hidden_size) per layer.

    Returns:
        Summed negative log-likelihood of each sample's targets, float64, (num_samples,), and what
        the router did.

    Raises:
        UpitError: a loss is NaN or infinite.
    """
    model, samples = stage.model, stage.seeds.samples
    routing = Routing(len(samples), len(model.mixture_layers), model.num_experts)
    description = "the mixture" if gates is None else "the control"
    count = routing.counter(samples)
    with swept(stage, count, description, gates, with_losses=True) as (states, on_targets):
        losses = model.losses(samples, states, on_progress=on_targets)
        sums = stage.processes.total(losses).sum(1)
    if not sums.isfinite().all():
        raise UpitError(
            f"{model.moe.label} gives NaN or infinite losses; its weights are broken, or overflow: "
            "make it with dtype: bfloat16."
        )
    routing.summed(stage.processes.total)
    return sums, routing


def run_expert(stage: RouterStage, expert: int) -> Tensor:
    """Push all samples through one expert, or the mean of all (`MEAN`), as a dense model.

    Returns:
        Summed negative log-likelihood of each sample's targets, float64, (num_samples,).

    Raises:
        UpitError: a loss is NaN or infinite.
    """
    # The batches of a sweep of all experts: a sample's last bits depend on its neighbours.
    stream = Stream(expert, stage.stream(0, stage.everything).batches)
    work = stage.work(stream.samples)
    with stage.states([stream]) as states, stage.bar(work, "a dense model") as bar:
        samples = stage.seeds.samples
        stage.model.sweep(samples, [stream], states, on_progress=bar.advance)
        on_targets = bar.part(stage.effort.head)
        losses = stage.model.losses(samples, states, on_progress=on_targets)
        sums = stage.processes.total(losses).sum(1)
    if not sums.isfinite().all():
        raise UpitError(
            f"The experts of {stage.model.moe.label} give NaN or infinite losses; its weights are "
            "broken, or overflow: make it with dtype: bfloat16."
        )
    return sums


def disk_bytes(model: LayerwiseMixture) -> tuple[int, int]:
    """Return what a mixture takes on disk, and one of its experts over all layers."""
    specs = model.moe.specs.values()
    names = set(model.architecture.expert_names([0]))
    of_expert = sum(spec.num_bytes for spec in specs if spec.name in names)
    return sum(spec.num_bytes for spec in specs), of_expert


def dense_bytes(model: LayerwiseMixture) -> int:
    """Return what a dense model takes on disk of the kind that a mixture was made from.

    That is not the mixture with one expert: a shared expert may be half of the dense FFN or
    nothing, and there are gates, copies and constants that no dense model has.
    """
    moe, form = model.moe, model.architecture.format
    settings = {**model.architecture.dense_settings(), **PLAIN}
    if not form.can_tie and HEAD in moe.specs and equal_tensors(moe, EMBEDDINGS, HEAD):
        settings["tie_word_embeddings"] = True
    of_expert = moe.specs[next(model.architecture.expert_names([0]))].dtype
    total = 0
    for name, shape in form.dense_shapes(settings):
        spec = moe.specs.get(form.backbone_names(name)[-1])
        total += prod(shape) * (spec.dtype if spec else of_expert).itemsize
    return total


def rows(evaluation: Evaluation) -> Iterator[tuple[str, list[float]]]:
    """Yield every group with its routing shares, mean over layers, (num_experts,)."""
    for name, members in evaluation.groups.members.items():
        yield name, evaluation.shares(members).mean(0).tolist()
