"""Pass 1: the Gram matrices of the checkpoints' deltas, all that parent selection needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from upit_merge.architecture import DenseArchitecture
from upit_merge.blocks import map_in_order, progress_bar, row_blocks
from upit_merge.checkpoints import Checkpoint
from upit_merge.errors import UpitError
from upit_merge.resume import Saver
from upit_merge.tensor_files import all_finite

# Sums are taken block by block, so the size must not depend on the machine.
_BLOCK_ELEMENTS = 1 << 18

# Likenesses are compared to this many digits, so that rounding differences between machines
# cannot decide who becomes a parent; true ties go to the lower index.
DECIDING_DIGITS = 10


def gram_block_elements(num_checkpoints: int) -> int:
    """Elements of a block in pass 1: fewer with more checkpoints, so that memory stays the same."""
    return max(1 << 12, min(_BLOCK_ELEMENTS, 8 * _BLOCK_ELEMENTS // num_checkpoints))


@dataclass(frozen=True)
class _Block:
    tensor: int
    name: str
    start: int
    stop: int
    device: torch.device


def block_gram(
    name: str, models: Sequence[Checkpoint], rows: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Inner products of the deltas of one block; differences, products and sums are float64.

    Args:
        name: Of the tensor, for messages.
        models: The base, then the m checkpoints.
        rows: Their values, all of one shape, on one device.

    Returns:
        float64 on the CPU, (m, m).

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    origin = rows[0].double().flatten()
    deltas = torch.empty(len(rows) - 1, origin.numel(), dtype=torch.float64, device=origin.device)
    for delta, values in zip(deltas, rows[1:], strict=True):
        torch.sub(values.double().flatten(), origin, out=delta)
    gram = (deltas @ deltas.T).cpu()
    if not gram.isfinite().all():
        refuse_non_finite(models, rows, name)
    return gram


def delta_gram(
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    architecture: DenseArchitecture,
    tensors: Collection[int],
    saver: Saver,
    *,
    devices: Sequence[torch.device],
    workers: int,
    quiet: bool,
) -> dict[int, torch.Tensor]:
    """Inner products of the FFN deltas of all checkpoints, one Gram matrix per tensor.

    The deltas of neighbouring checkpoints are so alike that lower precision drowns what tells
    them apart.

    Args:
        tensors: Indices of the FFN tensors to do.
        saver: Told of every tensor that is done.

    Returns:
        By tensor, float64 on the CPU, (num_checkpoints, num_checkpoints).

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    models = (base, *checkpoints)
    names = {
        index: name
        for index, (_layer, _projection, name) in enumerate(architecture.ffn_names())
        if index in tensors
    }
    size = gram_block_elements(len(checkpoints))
    blocks = [
        _Block(index, name, start, stop, devices[index % len(devices)])
        for index, name in names.items()
        for start, stop in row_blocks(architecture.specs[name], size)
    ]

    def run(block: _Block) -> torch.Tensor:
        rows = [m.rows(block.name, block.start, block.stop).to(block.device) for m in models]
        return block_gram(block.name, models, rows)

    total: dict[int, torch.Tensor] = {}
    num_bytes = sum(m.specs[name].num_bytes for m in models for name in names.values())
    with progress_bar(num_bytes, "comparing checkpoints", quiet=quiet) as bar:
        for block, gram in zip(blocks, map_in_order(run, blocks, workers), strict=True):
            total[block.tensor] = total.get(block.tensor, 0) + gram
            if block.stop == architecture.specs[block.name].shape[0]:
                saver.finished(grams={block.tensor: total[block.tensor]})
            bar.update(
                sum((block.stop - block.start) * m.specs[block.name].row_bytes for m in models)
            )
    return total


def refuse_non_finite(
    models: Sequence[Checkpoint], rows: Sequence[torch.Tensor], name: str
) -> None:
    for model, values in zip(models, rows, strict=True):
        if not all_finite(values):
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


def dissimilarity(gram: torch.Tensor, similarity: str) -> torch.Tensor:
    """How different the owners of a Gram matrix are, (k, k); larger is more different.

    Rounded to the digits that may decide: 1 - cosine, or for `l2` the squared distance as a share
    of the largest one.
    """
    if similarity == "cosine":
        return torch.round(1 - cosine(gram), decimals=DECIDING_DIGITS)
    distances = squared_distance(gram)
    scale = float(distances.max()) or 1.0
    return torch.round(distances / scale, decimals=DECIDING_DIGITS)
