"""Pass 1: the Gram matrices of the checkpoints' deltas, all that parent selection needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from upit_merge.blocks import map_in_order, progress_bar, row_blocks
from upit_merge.checkpoints import Checkpoint
from upit_merge.errors import UpitError
from upit_merge.mixtral import DenseArchitecture

# Fixed: sums are taken block by block, so another size would round differently.
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class _Block:
    tensor: int
    name: str
    start: int
    stop: int


def delta_gram(
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    architecture: DenseArchitecture,
    *,
    device: torch.device,
    workers: int,
    quiet: bool,
) -> torch.Tensor:
    """Inner products of the FFN deltas of all checkpoints, one Gram matrix per tensor.

    The deltas of neighbouring checkpoints are so alike that lower precision drowns what tells
    them apart; differences, products and sums are float64.

    Returns:
        float64 on the CPU, (num_ffn_tensors, num_checkpoints, num_checkpoints).

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    names = [name for _layer, _projection, name in architecture.ffn_names()]
    blocks = [
        _Block(index, name, start, stop)
        for index, name in enumerate(names)
        for start, stop in row_blocks(architecture.specs[name], _BLOCK_ELEMENTS)
    ]
    models = (base, *checkpoints)

    def block_gram(block: _Block) -> torch.Tensor:
        rows = [m.rows(block.name, block.start, block.stop).to(device) for m in models]
        origin = rows[0].double()
        deltas = torch.stack([r.double().sub_(origin).flatten() for r in rows[1:]])
        gram = (deltas @ deltas.T).cpu()
        if not gram.isfinite().all():
            _refuse_non_finite(models, rows, block.name)
        return gram

    total = torch.zeros(len(names), len(checkpoints), len(checkpoints), dtype=torch.float64)
    num_bytes = sum(m.specs[name].num_bytes for m in models for name in names)
    with progress_bar(num_bytes, "comparing checkpoints", quiet=quiet) as bar:
        for block, gram in zip(blocks, map_in_order(block_gram, blocks, workers), strict=True):
            total[block.tensor] += gram
            rows_done = block.stop - block.start
            bar.update(sum(rows_done * m.specs[block.name].row_bytes for m in models))
    return total


def _refuse_non_finite(
    models: Sequence[Checkpoint], rows: Sequence[torch.Tensor], name: str
) -> None:
    for model, values in zip(models, rows, strict=True):
        if not values.isfinite().all():
            raise UpitError(
                f"Checkpoint {model.label} has NaN or infinite weights in {name}; use a checkpoint "
                "from before the training diverged."
            )
    raise UpitError(f"The differences between the checkpoints overflow in {name}; check them.")


def cosine(gram: torch.Tensor) -> torch.Tensor:
    """Cosine similarities from a Gram matrix (…, k, k).

    A zero delta has no direction: it counts as orthogonal to everything but other zero deltas.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    zero = norms == 0
    safe = torch.where(zero, torch.ones_like(norms), norms)
    result = gram / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
    both_zero = zero.unsqueeze(-1) & zero.unsqueeze(-2)
    return torch.where(both_zero, torch.ones_like(result), result)


def squared_distance(gram: torch.Tensor) -> torch.Tensor:
    """‖a − b‖² from a Gram matrix (…, k, k): ⟨a,a⟩ + ⟨b,b⟩ − 2⟨a,b⟩, never negative."""
    norms = gram.diagonal(dim1=-2, dim2=-1)
    result = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp(min=0)
    result.diagonal(dim1=-2, dim2=-1).zero_()
    return result
