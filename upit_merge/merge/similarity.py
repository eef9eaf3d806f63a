"""Pass 1: the Gram matrices of the checkpoints' deltas, all that parent selection needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from upit_merge.errors import UpitError
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import all_finite, row_blocks
from upit_merge.models.dense import DenseArchitecture
from upit_merge.models.lora.adapter import Adapter
from upit_merge.models.lora.low_rank import factor_gram
from upit_merge.output.journal import Saver
from upit_merge.runtime.parallel import map_in_order, progress_bar

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
    """Rows of a tensor; all of it where it is compared by the factors in `low_rank`."""

    tensor: int
    name: str
    start: int
    stop: int
    device: torch.device
    low_rank: Sequence[Adapter] | None = None


def block_gram(
    name: str, models: Sequence[DenseModel], rows: Sequence[torch.Tensor]
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
        check_finite(models, rows, name)
    return gram


def low_rank_deltas(
    base: DenseModel, checkpoints: Sequence[DenseModel], name: str
) -> list[Adapter] | None:
    """The checkpoints, if all their deltas of this tensor are products of factors (LoRA).

    Then how alike they are follows from the factors, and the base need not be read.
    """
    adapters = [
        model
        for model in checkpoints
        if isinstance(model, Adapter) and model.base is base and model.is_low_rank(name)
    ]
    return adapters if len(adapters) == len(checkpoints) else None


def low_rank_gram(adapters: Sequence[Adapter], name: str) -> torch.Tensor:
    """What the sum of `block_gram` over a tensor's blocks would be, from the adapters' factors.

    Raises:
        UpitError: a factor is NaN or infinite.
    """
    gram = factor_gram([adapter.low_rank(name) for adapter in adapters])
    if not gram.isfinite().all():
        raise _overflow(name)
    return gram


def delta_gram(
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
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
    them apart. Where all are adapters of the base, their factors are compared instead.

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
    blocks: list[_Block] = []
    for index, name in names.items():
        spec, device = architecture.specs[name], devices[index % len(devices)]
        if adapters := low_rank_deltas(base, checkpoints, name):
            blocks.append(_Block(index, name, 0, spec.shape[0], device, adapters))
            continue
        blocks += [_Block(index, name, *rows, device) for rows in row_blocks(spec, size)]

    def bytes_of(block: _Block) -> int:
        if block.low_rank:
            return sum(adapter.factor_bytes for adapter in block.low_rank)
        return sum((block.stop - block.start) * m.specs[block.name].row_bytes for m in models)

    def run(block: _Block) -> torch.Tensor:
        if block.low_rank:
            return low_rank_gram(block.low_rank, block.name)
        rows = [m.rows(block.name, block.start, block.stop).to(block.device) for m in models]
        return block_gram(block.name, models, rows)

    total: dict[int, torch.Tensor] = {}
    with progress_bar(sum(map(bytes_of, blocks)), "comparing checkpoints", quiet=quiet) as bar:
        for block, gram in zip(blocks, map_in_order(run, blocks, workers), strict=True):
            total[block.tensor] = total.get(block.tensor, 0) + gram
            if block.stop == architecture.specs[block.name].shape[0]:
                saver.finished(grams={block.tensor: total[block.tensor]})
            bar.update(bytes_of(block))
    return total


def check_finite(models: Sequence[DenseModel], rows: Sequence[torch.Tensor], name: str) -> None:
    for model, values in zip(models, rows, strict=True):
        if not all_finite(values):
            raise UpitError(
                f"Checkpoint {model.label} has NaN or infinite weights in {name}; use a checkpoint "
                "from before the training diverged."
            )
    raise _overflow(name)


def _overflow(name: str) -> UpitError:
    return UpitError(f"The differences between the checkpoints overflow in {name}; check them.")


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
