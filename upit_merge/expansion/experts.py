"""Pass 2: every expert's tensors and the shared backbone, block by block, straight to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from upit_merge.blocks import map_in_order, progress_bar, row_blocks
from upit_merge.checkpoints import Checkpoint
from upit_merge.errors import UpitError
from upit_merge.expansion.dare import dare, index_hash, mask_key
from upit_merge.expansion.lineage import Lineage
from upit_merge.mixtral import DenseArchitecture, expert_tensor
from upit_merge.tensor_files import ShardWriter, TensorSpec

# Small enough that the dozen passes over a block run in the processor's cache, large enough that
# Python's part does not show; a GPU wants more work at a time. Results do not depend on it.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}


def block_elements(device: torch.device, mutation: str, num_experts: int) -> int:
    """Elements of a block; smaller where all experts' deltas of it are alive at once."""
    size = _BLOCK_ELEMENTS[device.type]
    return max(1 << 14, size * 16 // (16 + num_experts)) if mutation == "compound" else size


@dataclass(frozen=True)
class ExpertBuilder:
    """Computes blocks of experts; pure arithmetic, no files.

    Args:
        lineage: Who the experts are.
        densities: (num_ffn_tensors, num_checkpoints), float64.
        seed: Of the DARE masks.
    """

    lineage: Lineage
    densities: torch.Tensor
    seed: int

    def checkpoints_needed(self) -> list[int]:
        """Indices of the checkpoints that occur in some expert."""
        weights = torch.tensor([expert.weights for expert in self.lineage.experts])
        return [int(i) for i in weights.any(0).nonzero().flatten()]

    def block(
        self,
        tensor: int,
        name: str,
        first_element: int,
        base: torch.Tensor,
        checkpoints: dict[int, torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (expert index, values) for one block of one FFN tensor.

        Args:
            tensor: Index of the tensor, a row of `densities`.
            name: Its dense name, part of the mask keys.
            first_element: Index of the block's first element in the flattened tensor.
            base: The base's values, stored dtype, any shape.
            checkpoints: The values of the checkpoints needed, same shape.

        Yields:
            Checkpoint experts in their stored dtype, children in float32; shape of `base`.
        """
        origin = base.float()
        deltas = {i: (values.float() - origin).flatten() for i, values in checkpoints.items()}
        hashed = index_hash(
            mask_key(self.seed, "element", name), first_element, base.numel(), base.device
        )
        if self.lineage.mutation == "compound":
            yield from self._compound(tensor, name, origin, deltas, hashed, checkpoints)
            return
        for index, expert in enumerate(self.lineage.experts):
            if expert.checkpoint is not None:
                yield index, checkpoints[expert.checkpoint]
                continue
            parts = [(i, w) for i, w in enumerate(expert.weights) if w != 0]
            child: torch.Tensor | None = None
            for i, weight in parts:
                key = mask_key(self.seed, index, i, name)
                part = dare(deltas[i], hashed, key, float(self.densities[tensor, i]), weight)
                child = part if child is None else child.add_(part)
            assert child is not None
            yield index, child.view_as(origin).add_(origin)

    def _compound(
        self,
        tensor: int,
        name: str,
        origin: torch.Tensor,
        deltas: dict[int, torch.Tensor],
        hashed: torch.Tensor,
        checkpoints: dict[int, torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        density = float(self.densities[tensor, 0])
        grown: list[torch.Tensor] = []
        for index, expert in enumerate(self.lineage.experts):
            if expert.checkpoint is not None:
                grown.append(deltas[expert.checkpoint])
                yield index, checkpoints[expert.checkpoint]
                continue
            assert expert.parents is not None
            assert expert.alpha is not None
            first, second = (
                dare(grown[parent], hashed, mask_key(self.seed, index, slot, name), density, weight)
                for slot, (parent, weight) in enumerate(
                    zip(expert.parents, (expert.alpha, 1 - expert.alpha), strict=True)
                )
            )
            grown.append(first.add_(second))
            yield index, grown[-1].view_as(origin) + origin


@dataclass(frozen=True)
class _Job:
    spec: TensorSpec
    start: int
    stop: int
    ffn: tuple[int, int, str] | None  # (index among the FFN tensors, layer, projection)


def write_experts(
    writer: ShardWriter,
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    backbone: Sequence[Checkpoint],
    architecture: DenseArchitecture,
    builder: ExpertBuilder,
    *,
    device: torch.device,
    workers: int,
    quiet: bool,
) -> None:
    """Write all experts and the backbone; every input tensor is read once.

    Args:
        backbone: The models whose attention, norms and embeddings are averaged; usually one.

    Raises:
        UpitError: a backbone weight is NaN or infinite, or an expert overflows float16.
    """
    needed = builder.checkpoints_needed()
    ffn = {
        name: (index, layer, projection)
        for index, (layer, projection, name) in enumerate(architecture.ffn_names())
    }
    size = block_elements(device, builder.lineage.mutation, len(builder.lineage))
    jobs = [
        _Job(spec, start, stop, ffn.get(name))
        for name, spec in architecture.specs.items()
        for start, stop in row_blocks(spec, size)
    ]

    def run(job: _Job) -> int:
        name, start, stop = job.spec.name, job.start, job.stop
        if job.ffn is None:
            rows = _mean_rows(backbone, name, start, stop)
            writer.write(name, start, _cast(rows, writer.dtype(name), f"The backbone's {name}"))
            return rows.numel()
        index, layer, projection = job.ffn
        first_element = start * (job.spec.numel // job.spec.shape[0])
        origin = base.rows(name, start, stop).to(device)
        inputs = {i: checkpoints[i].rows(name, start, stop).to(device) for i in needed}
        written = 0
        for expert, rows in builder.block(index, name, first_element, origin, inputs):
            target = expert_tensor(layer, expert, projection)
            cast = _cast(rows, writer.dtype(target), f"Expert {expert}'s {name}")
            writer.write(target, start, cast)
            written += cast.numel()
        return written

    total = sum(
        spec.numel * (len(builder.lineage) if name in ffn else 1)
        for name, spec in architecture.specs.items()
    )
    itemsize = writer.dtype(next(iter(architecture.backbone_names()))).itemsize
    with progress_bar(total * itemsize, "writing experts", quiet=quiet) as bar:
        for written in map_in_order(run, jobs, workers):
            bar.update(written * itemsize)


def _cast(rows: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """To the output's dtype; inputs are finite by now, so infinities are overflows of the cast."""
    cast = rows.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise UpitError(f"{what} overflows float16; set dtype: bfloat16.")
    return cast


def _mean_rows(models: Sequence[Checkpoint], name: str, start: int, stop: int) -> torch.Tensor:
    """The mean of the models' rows, in float32; those of a single model as they are stored."""
    total: torch.Tensor | None = None
    for model in models:
        rows = model.rows(name, start, stop)
        if not rows.isfinite().all():
            raise UpitError(
                f"Checkpoint {model.label} has NaN or infinite weights in {name}; use a checkpoint "
                "from before the training diverged."
            )
        if len(models) == 1:
            return rows
        total = rows.float() if total is None else total.add_(rows.float())
    assert total is not None
    return total.div_(len(models))
