"""Losses of all experts to first order: group by group of samples, resumable, checked."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upit_merge.engine.first_order import MeanSweeps
from upit_merge.engine.hidden_states import (
    MEAN,
    Batch,
    LayersOnDisk,
    PackedStates,
    Stream,
    token_batches,
)
from upit_merge.io.disk import check_space
from upit_merge.router.control import (
    ROUNDING,
    Control,
    control_pairs,
)
from upit_merge.router.memory import group_tokens, shape_of_model
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.work_bar import WorkBar

LOG = logging.getLogger(__name__)

# What a layer costs backwards, in units of forwards: it is computed again, and differentiated.
BACKWARDS = 3
# What the head costs with its slopes, in units of its logits.
HEAD = 2


@dataclass(frozen=True)
class FirstOrder:
    """Every sample's losses to first order.

    Attributes:
        mean: Negative log-likelihood under the mean of the experts, summed over a sample's targets,
            float64, (num_samples,).
        products: What every expert changes of it, float64, (num_samples, num_experts).
        targets: Target tokens of every sample, float64, (num_samples,).
    """

    mean: Tensor
    products: Tensor
    targets: Tensor

    @property
    def means(self) -> Tensor:
        """Nats per target token, (num_samples, num_experts)."""
        return (self.mean.unsqueeze(1) + self.products) / self.targets.unsqueeze(1)

    @property
    def is_finite(self) -> bool:
        return bool(self.mean.isfinite().all() and self.products.isfinite().all())


def first_order(stage: RouterStage, *, keep_inputs: bool = False) -> FirstOrder:
    """Estimate every sample's loss under every expert in one forward and one backward sweep.

    Args:
        keep_inputs: Leave what the gates see on the way forwards to the stage.
    """
    return _Sweeps(stage, stage.open_gate_inputs() if keep_inputs else None).run()


class _Sweeps:
    """The sweeps of a stage, in groups whose hidden states of all layers fit the memory."""

    def __init__(self, stage: RouterStage, gate_inputs: LayersOnDisk | None) -> None:
        self.stage = stage
        self.gate_inputs = gate_inputs
        samples = stage.seeds.samples
        batches = list(token_batches(stage.everything, stage.lengths, stage.settings.batch_tokens))
        self.groups = list(self._grouped(batches))
        self.sweeps = MeanSweeps(stage.model, samples, stage.scratch)

    def _grouped(self, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Groups of batches; those of a group are shared by the processes."""
        stage, size = self.stage, self.stage.processes.size
        arithmetic = stage.model.arithmetic
        limit = size * group_tokens(
            shape_of_model(stage.model),
            stage.lengths,
            stage.settings,
            arithmetic.states.itemsize,
            arithmetic.products.itemsize,
        )
        group: list[Batch] = []
        tokens = 0
        for start in range(0, len(batches), size):
            some = batches[start : start + size]
            count = sum(stage.lengths[index] for batch in some for index in batch)
            if group and tokens + count > limit:
                yield group
                group, tokens = [], 0
            group += some
            tokens += count
        if group:
            yield group

    def run(self) -> FirstOrder:
        stage = self.stage
        samples, model = stage.seeds.samples, stage.model
        mean = torch.full((len(samples),), torch.nan, dtype=torch.float64)
        products = torch.zeros(len(samples), model.num_experts, dtype=torch.float64)
        done = torch.zeros(len(samples), dtype=torch.bool)
        if kept := stage.progress.kept("first-order"):
            mean, products, done = (kept[0][key] for key in ("mean", "products", "done"))
        stream = stage.stream(MEAN, stage.everything)
        with (
            stage.clock.measure("losses"),
            contextlib.closing(self.sweeps),
            stage.bar(self._work(stream.samples), "losses of the experts") as bar,
        ):
            for batches in self.groups:
                mine = Stream(MEAN, tuple(batches)).share(stage.processes)
                members = torch.tensor(sorted(index for batch in batches for index in batch))
                # With less computed at a time than before, groups are others than those kept.
                if done[members].all():
                    bar.skip(self._work(mine.samples))
                    continue
                sums, found = self._group(members, mine.batches, bar)
                mean[members] = stage.processes.total(sums)
                products[members] = stage.processes.total(found)
                done[members] = True
                stage.progress.keep(
                    "first-order", {"mean": mean, "products": products, "done": done}
                )
                stage.progress.drop_states()
        targets = torch.tensor([sample.num_targets for sample in samples], dtype=torch.float64)
        return FirstOrder(mean, products, targets)

    def _work(self, members: Sequence[int]) -> float:
        """What some samples take, in tokens through a layer."""
        stage = self.stage
        tokens = sum(stage.lengths[index] for index in members)
        layers = tokens * stage.model.num_layers * (1 + BACKWARDS)
        return layers + HEAD * stage.effort.head * stage.targets(members)

    def _group(
        self, members: Tensor, batches: Sequence[Batch], bar: WorkBar
    ) -> tuple[Tensor, Tensor]:
        """Forwards and backwards with some batches.

        Returns:
            Losses and products of the members, as far as they are this process's.
        """
        stage = self.stage
        name = f"first-order-{zlib.crc32(members.numpy().tobytes()):08x}"
        layers = stage.model.num_layers
        held = {index for batch in batches for index in batch}
        lengths = [length if i in held else 0 for i, length in enumerate(stage.lengths)]
        tokens = sum(lengths)
        with contextlib.ExitStack() as stack:
            states, slope = (
                stack.enter_context(self._states(lengths, dtype))
                for dtype in (stage.model.dtype, torch.float32)
            )
            entering = stack.enter_context(self._entering(lengths))
            self.sweeps.forwards(
                batches,
                states,
                entering,
                look=None if self.gate_inputs is None else self.gate_inputs.put,
                on_progress=bar.advance,
            )
            sums = self.sweeps.head(batches, states, slope)
            bar.advance(HEAD * stage.effort.head * stage.targets(held))
            done, found = stage.progress.states(name, slope, with_results=True, own=True)
            bar.skip(tokens * done * BACKWARDS)

            def after_layer(products: Tensor) -> None:
                found.append(products[members])
                if len(found) < layers:
                    stage.progress.keep_states(name, len(found), slope, found, own=True)

            self.sweeps.backwards(
                batches,
                entering,
                states,
                slope,
                first=layers - 1 - done,
                after_layer=after_layer,
                on_progress=bar.part(BACKWARDS),
            )
        return sums[members], torch.stack(found).sum(0)

    @contextlib.contextmanager
    def _entering(self, lengths: Sequence[int]) -> Iterator[LayersOnDisk]:
        """Room for what enters every layer."""
        model, scratch = self.stage.model, self.stage.scratch
        size = sum(lengths) * model.hidden_size * model.dtype.itemsize * model.num_layers
        check_space(scratch, size, "the router's hidden states")
        with contextlib.closing(
            LayersOnDisk(
                lengths,
                model.hidden_size,
                model.dtype,
                num_layers=model.num_layers,
                folder=scratch,
                name="entering",
            )
        ) as entering:
            yield entering

    @contextlib.contextmanager
    def _states(self, lengths: Sequence[int], dtype: torch.dtype) -> Iterator[PackedStates]:
        stage = self.stage
        with contextlib.closing(
            PackedStates(
                lengths,
                stage.model.hidden_size,
                dtype,
                scratch=stage.scratch,
                budget_bytes=float(stage.settings.memory_gb) * 2**30 / 2,
            )
        ) as states:
            yield states


def checked_losses(stage: RouterStage, *, keep_inputs: bool = False) -> SampleLosses:
    """Return losses to first order, as far as a control group says that they can be relied on.

    Where the expert that is best to first order gives up too much, exact losses of the most
    promising ones decide, as many as the control group asks for; where that are too many, exact
    losses of all.

    Args:
        keep_inputs: See `first_order`.
    """
    estimated = first_order(stage, keep_inputs=keep_inputs)
    if not estimated.is_finite:
        return stage.losses()  # which says whose fault it is
    guess = estimated.means
    pairs = control_pairs(guess, stage.seed)
    control = Control.of(guess, stage.exact_losses(pairs, "control"))
    trusted = control.trusted
    by = f"first_order, exact for {trusted}" if trusted > 1 else "first_order"
    if trusted > 1 and stage.settings.losses == "first_order":
        if stage.processes.is_first:
            LOG.warning("%s Use losses: auto, or exact.", control.complaint())
        by, trusted = "first_order", 1
    elif 2 * trusted > stage.model.num_experts:
        if stage.processes.is_first:
            LOG.warning("%s Every expert's exact losses are computed.", control.complaint())
        return replace(stage.losses(), told={"by": "exact", "control": control.to_report()})
    elif trusted > 1 and stage.processes.is_first:
        LOG.warning(
            "%s Exact losses of the %d most promising experts of every sample are computed.",
            control.complaint(),
            trusted,
        )
    order = guess.argsort(dim=1, stable=True)[:, :trusted]
    levels = guess + control.offsets
    if trusted > 1:
        for rank in range(trusted):
            candidates = list(enumerate(order[:, rank].tolist()))
            exact = stage.exact_losses(candidates, f"candidates-{rank}").means
            levels[torch.arange(len(levels)), order[:, rank]] = exact
    # What is less certain never beats what was chosen to be relied on.
    best = levels.gather(1, order).min(1, keepdim=True).values
    others = torch.ones_like(levels, dtype=torch.bool).scatter(1, order, False)
    levels = torch.where(others, levels.clamp(min=best + ROUNDING), levels)
    return SampleLosses(
        torch.stack([torch.zeros_like(levels), levels * estimated.targets.unsqueeze(1)], 2),
        torch.stack([torch.zeros_like(estimated.targets), estimated.targets], 1),
        {"by": by, "control": control.to_report()},
        control.losses,
    )
