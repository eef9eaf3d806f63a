"""The merge stage: how alike the checkpoints are, who the experts become, all weights on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from upit_merge.io.shards import Shard, ShardWriter
from upit_merge.io.tensor_file import TensorSpec, row_blocks
from upit_merge.merge.blocks import SUM_BLOCK_ELEMENTS
from upit_merge.merge.experts import Sink, write_experts
from upit_merge.merge.growth import needs_gram, plan_lineage
from upit_merge.merge.inputs import Inputs
from upit_merge.merge.lineage import Lineage
from upit_merge.merge.right_base import warn_of_foreign_base
from upit_merge.merge.similarity import Grams, delta_gram
from upit_merge.models.gates import training_free_gates
from upit_merge.output.journal import Journal, Saver
from upit_merge.output.staging import Staging
from upit_merge.runtime.clock import Clock
from upit_merge.runtime.processes import Processes

LOG = logging.getLogger(__name__)


def is_one_pass(inputs: Inputs) -> bool:
    """Return whether the experts are known before the checkpoints have been compared."""
    return not needs_gram(len(inputs.checkpoints), inputs.num_experts, inputs.recipe.parameters)


def find_lineage(inputs: Inputs, gram: torch.Tensor | None = None) -> Lineage:
    """Return who the experts are.

    Args:
        gram: (num_tensors, m, m); None where it does not matter to who they are, as `is_one_pass`
            says.
    """
    if gram is None:
        count = len(inputs.checkpoints)
        gram = torch.zeros(len(inputs.densities), count, count, dtype=torch.float64)
    return plan_lineage(gram, inputs.densities, inputs.num_experts, inputs.recipe.parameters)


def measure_similarity(
    inputs: Inputs, devices: Sequence[torch.device], *, quiet: bool = False
) -> torch.Tensor:
    """Do pass 1 alone, for who only wants to look; (num_tensors, m, m)."""
    tensors = range(len(inputs.densities))
    with Saver(None) as saver:
        return _stacked(delta_gram(inputs, tensors, saver, devices=devices, quiet=quiet))


def write_constants(sink: Sink, inputs: Inputs) -> None:
    """Write what no checkpoint has, and the training-free gates, as far as the sink wants them."""
    architecture = inputs.architecture
    form, settings = architecture.format, architecture.settings
    for constant in form.constants(settings, inputs.num_experts):
        if not sink.wants(constant.name):
            continue
        dtype = sink.dtype(constant.name)
        spec = TensorSpec(constant.name, constant.shape, dtype)
        for start, stop in row_blocks(spec, SUM_BLOCK_ELEMENTS):
            rows = torch.full((stop - start, *constant.shape[1:]), constant.value, dtype=dtype)
            sink.write(constant.name, start, rows)
    names = form.gate_names(architecture.mixture_layers)
    if any(map(sink.wants, names)):
        donor, seed = inputs.settings_donor, inputs.recipe.seed
        gates = training_free_gates(
            donor, form, architecture.mixture_layers, inputs.num_experts, seed
        )
        for name, gate in zip(names, gates, strict=True):
            sink.write(name, 0, gate)


@dataclass(frozen=True)
class Merged:
    """What the merge stage returns: the Gram matrices, (num_tensors, m, m), and the experts."""

    gram: torch.Tensor
    lineage: Lineage


def merge(
    inputs: Inputs,
    staging: Staging,
    shards: Sequence[Shard],
    processes: Processes,
    clock: Clock,
    *,
    devices: Sequence[torch.device],
    quiet: bool,
) -> Merged:
    """Write all weights into the staging folder; goes on where a killed run stopped.

    Processes share the FFN tensors in pass 1 and the shards in pass 2: nobody writes into
    another's file. Every process has the same result.

    Args:
        devices: Blocks take turns on them.

    Raises:
        UpitError: a weight is NaN or infinite, an expert overflows float16, or another process
            failed.
    """
    journal, one_pass = Journal(staging.root, processes.rank), is_one_pass(inputs)
    grams = dict(journal.grams)
    processes.gather(None)  # nobody writes into a journal before everybody has read them all
    if not one_pass:
        mine = range(len(inputs.densities))[processes.rank :: processes.size]
        missing = [tensor for tensor in mine if tensor not in grams]
        with clock.measure("similarity"), processes.together(), Saver(journal) as saver:
            measured = delta_gram(inputs, missing, saver, devices=devices, quiet=quiet)
        grams |= _joined(processes.gather(measured))
    lineage = find_lineage(inputs, None if one_pass else _stacked(grams))
    if processes.is_first:
        LOG.info("Expansion: %s", lineage.summary)
        if not one_pass:
            warn_of_foreign_base(inputs, _stacked(grams))
    my_shards = share_of(shards, processes)
    with (
        clock.measure("experts"),
        processes.together(),
        ShardWriter(staging.model, my_shards, journal.written) as writer,
        Saver(journal, writer.sync) as saver,
    ):
        missing = [tensor for tensor in _first_experts(inputs, my_shards) if tensor not in grams]
        measured = write_experts(
            writer, inputs, lineage, saver, grams=missing, devices=devices, quiet=quiet
        )
        write_constants(writer, inputs)
    grams |= _joined(processes.gather(measured))
    gram = _stacked(grams)
    if one_pass and processes.is_first:
        warn_of_foreign_base(inputs, gram)
    return Merged(gram, find_lineage(inputs, gram) if one_pass else lineage)


def _stacked(grams: Grams) -> torch.Tensor:
    """Return the Gram matrices of all FFN tensors, (num_tensors, m, m), in order."""
    return torch.stack([gram for _tensor, gram in sorted(grams.items())])


def _joined(parts: Iterable[Grams]) -> Grams:
    return {tensor: gram for part in parts for tensor, gram in part.items()}


def _first_experts(inputs: Inputs, shards: Iterable[Shard]) -> list[int]:
    """Return the FFN tensors whose first expert is in these shards: one process has each."""
    names = {spec.name for shard in shards for spec in shard.parts}
    architecture = inputs.architecture
    return [
        index
        for index, (layer, projection, _name) in enumerate(architecture.ffn_names())
        if architecture.format.expert_tensor(layer, 0, projection) in names
    ]


def share_of(shards: Sequence[Shard], processes: Processes) -> list[Shard]:
    """Return the shards this process writes: neighbours, so that few tensors are read by two."""
    total = sum(shard.num_bytes for shard in shards)
    mine, begin = [], 0
    for shard in shards:
        middle = begin + shard.num_bytes / 2
        if min(processes.size - 1, int(middle * processes.size / total)) == processes.rank:
            mine.append(shard)
        begin += shard.num_bytes
    return mine
