"""The merge stage: how alike the checkpoints are, who the experts become, all weights on disk."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from upit_merge.io.shards import Shard, ShardWriter
from upit_merge.merge.experts import ExpertBuilder, Sink, block_bytes, write_experts
from upit_merge.merge.growth import needs_gram, plan_lineage
from upit_merge.merge.inputs import Inputs
from upit_merge.merge.lineage import Lineage
from upit_merge.merge.similarity import delta_gram
from upit_merge.merge.upcycle import Perturbation
from upit_merge.models.gates import training_free_gates
from upit_merge.models.lora.adapter import Adapter
from upit_merge.output.journal import Journal, Saver
from upit_merge.output.staging import Staging
from upit_merge.runtime.device import merge_workers
from upit_merge.runtime.processes import Processes

LOG = logging.getLogger(__name__)

Grams = dict[int, torch.Tensor]


@dataclass(frozen=True)
class Merger:
    """The two passes over a recipe's models, on this process's devices.

    Args:
        inputs: The recipe's models.
        devices: Blocks take turns on them.
        quiet: No progress bars.
    """

    inputs: Inputs
    devices: tuple[torch.device, ...]
    quiet: bool = False

    @property
    def _block_bytes(self) -> int:
        parameters = self.inputs.recipe.parameters
        experts, models = self.inputs.num_experts, len(self.inputs.models)
        return block_bytes(self.devices[0], parameters.mutation, experts, models)

    @property
    def _workers(self) -> int:
        return merge_workers(self.devices, self._block_bytes)

    @property
    def memory(self) -> int:
        """Bytes the passes hold at their peak: blocks, whatever the size of the model."""
        adapters = [model for model in self.inputs.checkpoints if isinstance(model, Adapter)]
        # Adapters are compared by their factors side by side, in float64 and stacked.
        factors = max(4 * sum(adapter.factor_bytes for adapter in adapters), self._block_bytes)
        # One block more than there are threads waits with its result.
        held = sum(adapter.cached_bytes for adapter in adapters)
        return (self._workers + 1) * factors + held

    @property
    def tensors(self) -> range:
        """Indices of the FFN tensors."""
        return range(len(self.inputs.densities))

    @property
    def one_pass(self) -> bool:
        """Whether the experts are known before the checkpoints have been compared."""
        inputs = self.inputs
        return not needs_gram(len(inputs.checkpoints), inputs.num_experts, inputs.recipe.parameters)

    def grams(self, tensors: Collection[int], saver: Saver) -> Grams:
        """Pass 1 over some of the FFN tensors, see `delta_gram`."""
        return delta_gram(
            self.inputs.base,
            self.inputs.checkpoints,
            self.inputs.architecture,
            tensors,
            saver,
            devices=self.devices,
            workers=self._workers,
            quiet=self.quiet,
        )

    def _alteration(self) -> Perturbation | None:
        inputs = self.inputs
        return Perturbation.of(inputs.checkpoints, inputs.architecture, inputs.recipe.parameters)

    def lineage(self, gram: torch.Tensor | None = None) -> Lineage:
        """Who the experts are; without a Gram matrix, where it does not matter to who they are."""
        inputs = self.inputs
        if gram is None:
            count = len(inputs.checkpoints)
            gram = torch.zeros(len(inputs.densities), count, count, dtype=torch.float64)
        return plan_lineage(gram, inputs.densities, inputs.num_experts, inputs.recipe.parameters)

    def write(
        self,
        sink: Sink,
        lineage: Lineage,
        saver: Saver,
        *,
        grams: Collection[int] = (),
        description: str = "writing experts",
    ) -> Grams:
        """Pass 2, see `write_experts`, and the training-free gates."""
        inputs = self.inputs
        found = write_experts(
            sink,
            inputs.base,
            inputs.checkpoints,
            inputs.backbone,
            inputs.architecture,
            ExpertBuilder(lineage, inputs.densities, inputs.recipe.seed, self._alteration()),
            saver,
            grams=grams,
            devices=self.devices,
            workers=self._workers,
            quiet=self.quiet,
            description=description,
        )
        gates = inputs.architecture.format.gate_names(inputs.architecture.num_layers)
        if any(map(sink.wants, gates)):
            fresh = training_free_gates(
                inputs.settings_donor, len(gates), inputs.num_experts, inputs.recipe.seed
            )
            for name, gate in zip(gates, fresh, strict=True):
                sink.write(name, 0, gate)
        return found


def stacked(grams: Grams) -> torch.Tensor:
    """The Gram matrices of all FFN tensors, (num_tensors, m, m), in order."""
    return torch.stack([gram for _tensor, gram in sorted(grams.items())])


def measure_similarity(merger: Merger) -> torch.Tensor:
    """Pass 1 alone, for who only wants to look; (num_tensors, m, m)."""
    with Saver(None) as saver:
        return stacked(merger.grams(merger.tensors, saver))


class Clock:
    """Wall time of the named stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)


@dataclass(frozen=True)
class Merged:
    """What the merge stage found: the Gram matrices, (num_tensors, m, m), and the experts."""

    gram: torch.Tensor
    lineage: Lineage


def merge(
    merger: Merger,
    staging: Staging,
    shards: Sequence[Shard],
    processes: Processes,
    clock: Clock,
) -> Merged:
    """Write all weights into the staging folder; goes on where a killed run stopped.

    Processes share the FFN tensors in pass 1 and the shards in pass 2: nobody writes into
    another's file. Every process has the same result.

    Raises:
        UpitError: a weight is NaN or infinite, an expert overflows float16, or another process
            failed.
    """
    journal = Journal(staging.root, processes.rank)
    grams = dict(journal.grams)
    processes.gather(None)  # nobody writes into a journal before everybody has read them all
    if not merger.one_pass:
        mine = merger.tensors[processes.rank :: processes.size]
        with clock.measure("similarity"), processes.together(), Saver(journal) as saver:
            found = merger.grams([t for t in mine if t not in grams], saver)
        grams |= _joined(processes.gather(found))
    lineage = merger.lineage(None if merger.one_pass else stacked(grams))
    if processes.is_first:
        LOG.info("Expansion: %s", lineage.summary)
    own = share_of(shards, processes)
    with (
        clock.measure("experts"),
        processes.together(),
        ShardWriter(staging.model, own, journal.written) as writer,
        Saver(journal, writer.sync) as saver,
    ):
        missing = [t for t in _first_experts(merger, own) if t not in grams]
        found = merger.write(writer, lineage, saver, grams=missing)
    grams |= _joined(processes.gather(found))
    gram = stacked(grams)
    return Merged(gram, merger.lineage(gram) if merger.one_pass else lineage)


def _first_experts(merger: Merger, shards: Iterable[Shard]) -> list[int]:
    """FFN tensors whose first expert is in these shards: exactly one process has each."""
    names = {spec.name for shard in shards for spec in shard.tensors}
    architecture = merger.inputs.architecture
    return [
        index
        for index, (layer, projection, _name) in enumerate(architecture.ffn_names())
        if architecture.format.expert_tensor(layer, 0, projection) in names
    ]


def share_of(shards: Sequence[Shard], processes: Processes) -> list[Shard]:
    """The shards this process writes: neighbours, so that few tensors are read by two."""
    total = sum(shard.num_bytes for shard in shards)
    mine, begin = [], 0
    for shard in shards:
        middle = begin + shard.num_bytes / 2
        if min(processes.size - 1, int(middle * processes.size / total)) == processes.rank:
            mine.append(shard)
        begin += shard.num_bytes
    return mine


def _joined(parts: Iterable[Grams]) -> Grams:
    return {tensor: gram for part in parts for tensor, gram in part.items()}
