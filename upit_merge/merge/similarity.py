"""Pass 1: the Gram matrices of the checkpoints' deltas, all that parent selection needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from upit_merge.errors import UpitError
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import all_finite, row_blocks
from upit_merge.merge.blocks import count_workers, gram_block_elements
from upit_merge.merge.inputs import Inputs
from upit_merge.models.dense import diverged
from upit_merge.models.lora.adapter import Adapter
from upit_merge.models.lora.low_rank import factor_gram
from upit_merge.models.views import stored_model, stored_tensor
from upit_merge.output.journal import Saver
from upit_merge.runtime.parallel import map_in_order, progress_bar

# By index of the FFN tensor: inner products of the checkpoints' deltas, float64, (m, m).
Grams = dict[int, torch.Tensor]

# Likenesses are compared to this many digits, so that rounding differences between machines
# cannot decide who becomes a parent; true ties go to the lower index.
DECIDING_DIGITS = 10


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
    """Compute the inner products of the deltas of one block; differences, products and sums are float64.

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
        raise not_finite(models, rows, name)
    return gram


def low_rank_deltas(inputs: Inputs, name: str) -> list[Adapter] | None:
    """Return the checkpoints, if all their deltas of this tensor are products of factors (LoRA).

    Then how alike they are follows from the factors, and the base need not be read.
    """
    base = stored_model(inputs.base)
    adapters = [
        stored
        for model in inputs.checkpoints
        if isinstance(stored := stored_model(model), Adapter)
        and stored.base is base
        and stored_tensor(model, name) == name
        and stored.is_low_rank(name)
    ]
    return adapters if len(adapters) == len(inputs.checkpoints) else None


def low_rank_gram(adapters: Sequence[Adapter], name: str) -> torch.Tensor:
    """Compute what `block_gram` sums to over a tensor's blocks, from the adapters' factors.

    Raises:
        UpitError: a factor is NaN or infinite.
    """
    gram = factor_gram([adapter.low_rank(name) for adapter in adapters])
    if not gram.isfinite().all():
        raise _overflow(name)
    return gram


def delta_gram(
    inputs: Inputs,
    tensors: Collection[int],
    saver: Saver,
    *,
    devices: Sequence[torch.device],
    quiet: bool,
) -> Grams:
    """Compute the inner products of the FFN deltas of all checkpoints.

    The deltas of neighbouring checkpoints are so alike that lower precision drowns what tells
    them apart. Where all are adapters of the base, their factors are compared instead.

    Args:
        tensors: Indices of the FFN tensors to do.
        saver: Told of every tensor that is done.
        devices: Blocks take turns on them.

    Returns:
        By tensor, float64 on the CPU, (num_checkpoints, num_checkpoints).

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    models, specs = inputs.models, inputs.architecture.specs
    size = gram_block_elements(len(inputs.checkpoints))
    blocks: list[_Block] = []
    for index, (_layer, _projection, name) in enumerate(inputs.architecture.ffn_names()):
        if index not in tensors:
            continue
        spec, device = specs[name], devices[index % len(devices)]
        if adapters := low_rank_deltas(inputs, name):
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

    total: Grams = {}
    workers = count_workers(inputs, devices)
    with progress_bar(sum(map(bytes_of, blocks)), "comparing checkpoints", quiet=quiet) as bar:
        for block, gram in zip(blocks, map_in_order(run, blocks, workers), strict=True):
            total[block.tensor] = total.get(block.tensor, 0) + gram
            if block.stop == specs[block.name].shape[0]:
                saver.finished(grams={block.tensor: total[block.tensor]})
            bar.update(bytes_of(block))
    return total


def not_finite(models: Sequence[DenseModel], rows: Sequence[torch.Tensor], name: str) -> UpitError:
    """Return the error for sums that are NaN or infinite: of the first broken model, if any is."""
    for model, values in zip(models, rows, strict=True):
        if not all_finite(values):
            return diverged(model, name)
    return _overflow(name)


def _overflow(name: str) -> UpitError:
    return UpitError(f"The differences between the checkpoints overflow in {name}; check them.")


def cosine(gram: torch.Tensor) -> torch.Tensor:
    """Return cosine similarities from a Gram matrix (…, k, k).

    A zero delta has no direction: it counts as orthogonal to everything but other zero deltas.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    zero = norms == 0
    safe = torch.where(zero, torch.ones_like(norms), norms)
    result = gram / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
    both_zero = zero.unsqueeze(-1) & zero.unsqueeze(-2)
    return torch.where(both_zero, torch.ones_like(result), result)


def squared_distance(gram: torch.Tensor) -> torch.Tensor:
    """Return ‖a − b‖² from a Gram matrix (…, k, k): ⟨a,a⟩ + ⟨b,b⟩ − 2⟨a,b⟩, never negative."""
    norms = gram.diagonal(dim1=-2, dim2=-1)
    result = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp(min=0)
    result.diagonal(dim1=-2, dim2=-1).zero_()
    return result


def dissimilarity(gram: torch.Tensor, similarity: str) -> torch.Tensor:
    """Return how different the owners of a Gram matrix are, (k, k); larger is more different.

    Rounded to the digits that may decide: 1 - cosine, or for `l2` the squared distance as a share
    of the largest one.
    """
    if similarity == "cosine":
        return torch.round(1 - cosine(gram), decimals=DECIDING_DIGITS)
    distances = squared_distance(gram)
    scale = float(distances.max()) or 1.0
    return torch.round(distances / scale, decimals=DECIDING_DIGITS)
