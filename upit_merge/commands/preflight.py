"""What a job needs of the machine, asked before the work: disk, memory, device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine.arithmetic import Arithmetic, has_fast_bfloat16
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.io.disk import free_bytes, missing_space
from upit_merge.io.shards import Shard
from upit_merge.merge.blocks import merge_memory
from upit_merge.merge.inputs import Inputs
from upit_merge.router.memory import RouterMemory, router_memory, shape_of, shape_of_model

LOG = logging.getLogger(__name__)

# What Python, torch and transformers take before any weight is read.
_IMPORTS_BYTES = 600 << 20
# A CUDA context and the libraries' work space.
_CUDA_BYTES = 700 << 20

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Needs:
    """What a run takes at its peak, in bytes.

    Attributes:
        disk: Of the output folder: the finished files, and hidden states that memory cannot hold.
        merge: RAM of the merge stage.
        router: RAM of router pre-training; None without it.
        device: Memory of every device's share; None on the CPU.
        devices: Where the arithmetic is done.
    """

    disk: int
    merge: int
    router: int | None
    device: int | None
    devices: tuple[torch.device, ...]

    @property
    def memory(self) -> int:
        """RAM at the worst moment."""
        return max(self.merge, self.router or 0)

    def shortages(self, out: Path | None, present: int = 0) -> Iterator[str]:
        """Yield what this machine cannot give, one sentence each.

        Args:
            out: The output folder, or where it will be.
            present: Bytes of the output that are on the disk already.
        """
        if out is not None and (missing := missing_space(out, self.disk - present, "the output")):
            yield missing
        limit, where = memory_limit()
        if self.memory > limit:
            stage, remedy = "merge", "use fewer threads (--num-threads)"
            if (self.router or 0) > self.merge:
                stage, remedy = "router", "lower router.batch_tokens, max_length or memory_gb"
            yield (
                f"The {stage} needs about {gib(self.memory)} of memory, but {where} has "
                f"{gib(limit)}; {remedy}, or use a machine with more."
            )
        for device in self.devices if self.device else ():
            total = torch.cuda.get_device_properties(device).total_memory
            if (self.device or 0) > total:
                yield (
                    f"The work needs about {gib(self.device or 0)} on {device}, which has "
                    f"{gib(total)}; lower router.batch_tokens, or use --device cpu."
                )

    def check(self, out: Path, present: int = 0) -> None:
        """Refuse a run that this machine cannot finish, and warn of one that will be tight.

        Raises:
            UpitError: naming what is needed and what there is.
        """
        for sentence in self.shortages(out, present):
            raise UpitError(sentence)
        available = psutil.virtual_memory().available
        if self.memory > available:
            LOG.warning(
                "About %s of memory are needed and %s are free now; close other programs, or "
                "expect the machine to swap.",
                gib(self.memory),
                gib(available),
            )

    def lines(self, out: Path | None) -> Iterator[str]:
        """Yield the same for people: what is needed beside what there is."""
        if out is not None:
            yield f"Disk: {gb(self.disk)} needed, {gb(free_bytes(out))} free in {out}."
        limit, where = memory_limit()
        parts = f"about {gib(self.merge)} for the merge"
        if self.router is not None:
            parts += f", about {gib(self.router)} for the router"
        yield f"Memory: {parts}; {where} has {gib(limit)}."
        for device in self.devices if self.device else ():
            total = torch.cuda.get_device_properties(device).total_memory
            yield f"{device}: about {gib(self.device or 0)} needed; it has {gib(total)}."


def needs(
    inputs: Inputs,
    devices: tuple[torch.device, ...],
    seeds: SeedSet | None,
    shards: Sequence[Shard],
) -> Needs:
    """Return what a run takes; nothing is read but what is open already."""
    cpu, peak = devices[0].type == "cpu", merge_memory(inputs, devices)
    merge = Needs(
        disk=sum(shard.num_bytes for shard in shards),
        merge=_IMPORTS_BYTES + peak,
        router=None,
        device=None if cpu else _CUDA_BYTES + peak,
        devices=devices,
    )
    if not seeds or not inputs.recipe.router:
        return merge
    lengths = [len(sample.input_ids) for sample in seeds.samples]
    shape = shape_of(
        inputs.architecture.format,
        inputs.architecture.settings,
        inputs.num_experts,
        inputs.dtype,
    )
    settings = inputs.recipe.router
    arithmetic = Arithmetic.of(
        settings.compute, devices[0], inputs.dtype, quick=has_fast_bfloat16()
    )
    memory = router_memory(shape, lengths, settings, cpu=cpu, arithmetic=arithmetic)
    router = router_needs(memory, devices[0])
    return replace(
        merge,
        disk=merge.disk + memory.spilled,
        router=router.router,
        device=None if cpu else max(merge.device or 0, router.device or 0),
    )


def check_router_memory(
    model: LayerwiseMixture,
    lengths: Sequence[int],
    settings: RouterSettings,
    out: Path,
    *,
    evaluated: bool = False,
) -> None:
    """Refuse training or evaluating a folder's router on a machine that is too small for it.

    Args:
        lengths: Tokens of the samples.
        evaluated: The mixture is only evaluated.

    Raises:
        UpitError: naming what is needed and what there is.
    """
    cpu = model.device.type == "cpu"
    shape = shape_of_model(model)
    memory = router_memory(
        shape, lengths, settings, cpu=cpu, evaluated=evaluated, arithmetic=model.arithmetic
    )
    router_needs(memory, model.device).check(out)


def router_needs(memory: RouterMemory, device: torch.device) -> Needs:
    """Return what router pre-training, or an evaluation, takes by itself."""
    cpu = device.type == "cpu"
    return Needs(
        disk=0,  # hidden states look for their room themselves
        merge=0,
        # On a device the layer and the batch are there; hidden states wait in RAM.
        router=_IMPORTS_BYTES + memory.states + (memory.compute if cpu else 0),
        device=None if cpu else _CUDA_BYTES + memory.compute,
        devices=(device,),
    )


def memory_limit() -> tuple[int, str]:
    """Return the RAM this process may ever use, in bytes, and what sets the limit."""
    total = psutil.virtual_memory().total
    for path in _CGROUPS:  # containers and notebooks: the machine's own memory is not theirs
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not Linux, or no limit ("max")
            continue
        if limit < total:
            return limit, "this container"
    return total, "this machine"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
