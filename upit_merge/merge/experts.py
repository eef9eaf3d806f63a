"""Pass 2: every expert's tensors and the shared backbone, block by block, straight to disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from upit_merge.errors import UpitError
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec, all_finite, row_blocks
from upit_merge.merge.blocks import block_elements, child_block_elements, count_workers
from upit_merge.merge.counter_rng import index_hash, mask_key
from upit_merge.merge.dare import Scratch, Share, dare_sum
from upit_merge.merge.inputs import Inputs
from upit_merge.merge.lineage import Expert, Lineage
from upit_merge.merge.similarity import Grams, block_gram, low_rank_deltas, low_rank_gram
from upit_merge.merge.upcycle import Perturbation
from upit_merge.models.dense import diverged
from upit_merge.models.lora.adapter import Adapter
from upit_merge.output.journal import Saver
from upit_merge.runtime.parallel import map_in_order, progress_bar


class Sink(Protocol):
    """Takes the rows of output tensors, in any order, from any thread."""

    def wants(self, name: str) -> bool:
        """Return whether a tensor is to be made at all."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype it is to be given in."""
        ...

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Take rows of it, beginning at row `start`."""
        ...


@dataclass(frozen=True)
class ExpertBuilder:
    """Computes blocks of experts; pure arithmetic, no files.

    Args:
        lineage: Who the experts are.
        densities: (num_ffn_tensors, num_checkpoints), float64.
        seed: Of the DARE masks.
        perturbation: What makes copies unlike; None keeps their bytes.
    """

    lineage: Lineage
    densities: torch.Tensor
    seed: int
    perturbation: Perturbation | None = None

    def block(
        self,
        tensor: int,
        name: str,
        first_element: int,
        base: torch.Tensor,
        checkpoints: dict[int, torch.Tensor],
        wanted: Collection[int],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (expert index, values) for one block of one FFN tensor.

        Args:
            tensor: Index of the tensor, a row of `densities`.
            name: Its dense name, part of the mask keys.
            first_element: Index of the block's first element in the flattened tensor.
            base: The base's values, stored dtype, any shape.
            checkpoints: The values of the checkpoints needed, same shape.
            wanted: Indices of the experts to compute.

        Yields:
            Checkpoint experts in their stored dtype, the others in float32; shape of `base`. What
            is computed is overwritten by the next one's values.
        """
        experts, mixed = self.lineage.unit_of(tensor).experts, []
        if self.perturbation is not None:
            copies = {i: own for i in wanted if (own := experts[i].checkpoint) is not None}
            yield from self.perturbation.block(tensor, first_element, checkpoints, copies)
            return
        for index in wanted:
            own = experts[index].checkpoint
            if own is None:
                mixed.append(index)
            else:
                yield index, checkpoints[own]
        if not mixed:
            return
        origin = base.float()
        deltas = {i: (values.float() - origin).flatten() for i, values in checkpoints.items()}
        hashed = index_hash(
            mask_key(self.seed, "element", name), first_element, base.numel(), base.device
        )
        # Where there are averages there are no children.
        if self.lineage.mutation == "compound" and not experts[mixed[0]].is_average:
            for index, values in self._compound(tensor, name, origin, deltas, hashed):
                if index in mixed:
                    yield index, values
            return
        densities, scratch = tuple(self.densities[tensor].tolist()), Scratch(hashed)
        shares = _shares(experts, densities, self.seed, name)
        for index in mixed:
            child = dare_sum(deltas, shares[index], hashed, scratch)
            yield index, child.view_as(origin).add_(origin)

    def _compound(
        self,
        tensor: int,
        name: str,
        origin: torch.Tensor,
        deltas: dict[int, torch.Tensor],
        hashed: torch.Tensor,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all children, as each may be a parent of the next."""
        density, scratch = float(self.densities[tensor, 0]), Scratch(hashed)
        experts = self.lineage.unit_of(tensor).experts
        shares = _compound_shares(experts, density, self.seed, name)
        grown: list[torch.Tensor] = []
        for index, expert in enumerate(experts):
            if expert.checkpoint is not None:
                grown.append(deltas[expert.checkpoint])
                continue
            grown.append(dare_sum(grown, shares[index], hashed, scratch).clone())
            yield index, grown[-1].view_as(origin) + origin


# Blocks of a few tensors are under way at a time, and all blocks of one have the same masks.
@lru_cache(maxsize=4)
def _shares(
    experts: Sequence[Expert], densities: Sequence[float], seed: int, name: str
) -> dict[int, list[Share]]:
    """Return what every child or average has of the checkpoints in one tensor."""
    return {
        index: [
            Share(i, mask_key(seed, index, i, name), 1.0 if expert.is_average else density, weight)
            for i, (weight, density) in enumerate(zip(expert.weights, densities, strict=True))
            if weight != 0
        ]
        for index, expert in enumerate(experts)
        if expert.checkpoint is None
    }


@lru_cache(maxsize=4)
def _compound_shares(
    experts: Sequence[Expert], density: float, seed: int, name: str
) -> dict[int, list[Share]]:
    """Return what every child has of its two parents in one tensor."""
    shares = {}
    for index, expert in enumerate(experts):
        if expert.parents is None or expert.alpha is None:
            continue
        halves = zip(expert.parents, (expert.alpha, 1 - expert.alpha), strict=True)
        shares[index] = [
            Share(parent, mask_key(seed, index, slot, name), density, weight)
            for slot, (parent, weight) in enumerate(halves)
        ]
    return shares


@dataclass(frozen=True)
class _Job:
    """A block of one dense tensor, and what is to be made of it.

    Attributes:
        targets: Names of the output's tensors by expert; of the backbone all that are this one.
        ffn: (index among the FFN tensors, dense name), or None for the backbone.
        with_gram: Its part of the Gram matrix is wanted too.
        low_rank: The checkpoints, if the tensor's Gram matrix comes from their factors.
    """

    spec: TensorSpec
    start: int
    stop: int
    targets: Mapping[int, str]
    ffn: tuple[int, str] | None
    with_gram: bool
    low_rank: Sequence[Adapter] | None
    device: torch.device

    @property
    def is_last(self) -> bool:
        return self.stop == self.spec.shape[0]


def write_experts(
    sink: Sink,
    inputs: Inputs,
    lineage: Lineage,
    saver: Saver,
    *,
    grams: Collection[int] = (),
    devices: Sequence[torch.device],
    quiet: bool,
    description: str = "writing experts",
) -> Grams:
    """Make all experts and the backbone that the sink wants; every input tensor is read once.

    Args:
        saver: Told of every tensor that is complete.
        grams: Indices of the FFN tensors whose Gram matrix is computed on the way.
        devices: Blocks take turns on them.

    Returns:
        The Gram matrices asked for, as `delta_gram` gives them.

    Raises:
        UpitError: a backbone weight is NaN or infinite, or an expert overflows float16.
    """
    checkpoints, parameters = inputs.checkpoints, inputs.recipe.parameters
    perturbation = Perturbation.of(checkpoints, inputs.architecture, parameters)
    builder = ExpertBuilder(lineage, inputs.densities, inputs.recipe.seed, perturbation)
    needed = {t: unit.checkpoints for unit in lineage.units for t in unit.tensors}
    jobs = list(_jobs(sink, inputs, lineage, grams, devices))

    def run(job: _Job) -> torch.Tensor | None:
        name, start, stop = job.spec.name, job.start, job.stop
        if job.ffn is None:
            rows = _mean_rows(inputs.donors(name), name, start, stop)
            if (factor := inputs.architecture.format.factor(name)) != 1:
                rows = rows * factor
            for target in job.targets.values():
                cast = _cast(rows, sink.dtype(target), f"The backbone's {name}")
                sink.write(target, start, cast)
            return None
        tensor = job.ffn[0]
        by_rows = job.with_gram and not job.low_rank
        read = range(len(checkpoints)) if by_rows else needed[tensor]
        origin = inputs.base.rows(name, start, stop).to(job.device)
        values = {i: checkpoints[i].rows(name, start, stop).to(job.device) for i in read}
        gram = block_gram(name, inputs.models, [origin, *values.values()]) if by_rows else None
        if job.low_rank and start == 0:
            gram = low_rank_gram(job.low_rank, name)
        first = start * (job.spec.numel // job.spec.shape[0])
        parents = {i: values[i] for i in needed[tensor]}
        for expert, rows in builder.block(tensor, name, first, origin, parents, job.targets):
            target = job.targets[expert]
            sink.write(target, start, _cast(rows, sink.dtype(target), f"Expert {expert}'s {name}"))
        return gram

    def bytes_of(job: _Job) -> int:
        per_row = job.spec.numel // job.spec.shape[0]
        return sum(
            (job.stop - job.start) * per_row * sink.dtype(target).itemsize
            for target in job.targets.values()
        )

    total: Grams = {}
    workers = count_workers(inputs, devices)
    with progress_bar(sum(map(bytes_of, jobs)), description, quiet=quiet) as bar:
        for job, gram in zip(jobs, map_in_order(run, jobs, workers), strict=True):
            if job.ffn and gram is not None:
                total[job.ffn[0]] = total.get(job.ffn[0], 0) + gram
            if job.is_last:
                done = {job.ffn[0]: total[job.ffn[0]]} if job.ffn and job.with_gram else {}
                rows = job.stop - job.start
                saver.finished(job.targets.values(), done, bytes_of(job) // rows * job.stop)
            bar.update(bytes_of(job))
    return total


def _jobs(
    sink: Sink,
    inputs: Inputs,
    lineage: Lineage,
    grams: Collection[int],
    devices: Sequence[torch.device],
) -> Iterator[_Job]:
    architecture = inputs.architecture
    ffn = {
        name: (index, layer, projection)
        for index, (layer, projection, name) in enumerate(architecture.ffn_names())
    }
    form = architecture.format
    name_of = form.expert_tensor
    size, child_size = (f(inputs, devices[0]) for f in (block_elements, child_block_elements))
    for count, (name, spec) in enumerate(architecture.specs.items()):
        index, layer, projection = ffn.get(name, (None, 0, ""))
        targets = dict(enumerate(form.outputs_of(name, architecture.settings)))
        if index is not None:
            targets = {e: name_of(layer, e, projection) for e in range(len(lineage))}
        targets = {expert: target for expert, target in targets.items() if sink.wants(target)}
        with_gram = index is not None and index in grams
        if not targets and not with_gram:
            continue
        tensor = None if index is None else (index, name)
        low_rank = low_rank_deltas(inputs, name) if with_gram else None
        device = devices[count % len(devices)]
        children = tensor and any(lineage.unit_of(tensor[0]).experts[e].parents for e in targets)
        for start, stop in row_blocks(spec, child_size if children and not with_gram else size):
            yield _Job(spec, start, stop, targets, tensor, with_gram, low_rank, device)


def _cast(rows: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """To the output's dtype; inputs are finite by now, so infinities are overflows of the cast."""
    cast = rows.to(dtype)
    if dtype == torch.float16 and not all_finite(cast):
        raise UpitError(f"{what} overflows float16; set dtype: bfloat16.")
    return cast


def _mean_rows(models: Sequence[DenseModel], name: str, start: int, stop: int) -> torch.Tensor:
    """The mean of the models' rows, in float32; those of a single model as they are stored."""
    total: torch.Tensor | None = None
    for model in models:
        rows = model.rows(name, start, stop)
        if not all_finite(rows):
            raise diverged(model, name)
        if len(models) == 1:
            return rows
        total = rows.float() if total is None else total.add_(rows.float())
    assert total is not None
    return total.div_(len(models))
