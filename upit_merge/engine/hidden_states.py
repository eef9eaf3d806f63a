"""Hidden states of many samples without padding, and the batches in which they are computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upit_merge.io.disk import check_space, reserve
from upit_merge.io.tensor_file import tensor_memory
from upit_merge.runtime.processes import Processes

MEAN = -1  # stands for the expert whose FFN is the mean of all

Batch = tuple[int, ...]  # indices of samples

# Share of the computed tokens that may be padding.
MOST_PADDING = 0.02
# A layer takes about as long for fewer tokens than this as for so many.
LEAST_TOKENS = 128
# What a batch costs beside its tokens, in tokens.
BATCH_PRICE = 8.0
# Prices that are tried, each twice the one before: the last makes batches as large as they may be.
_PRICES = 11


@dataclass(frozen=True)
class Stream:
    """Samples that go through the same expert.

    Attributes:
        expert: Its index, or `MEAN`.
        batches: Indices of the samples, batch by batch.
    """

    expert: int
    batches: tuple[Batch, ...]

    def share(self, processes: Processes) -> Stream:
        """Return the batches of this process.

        Batches are dealt out whole: with other neighbours in its batch, a sample's loss would
        differ in its last bits, and with it the result of one process and of several.
        """
        # Not all experts begin with the first process: a small bucket has but one batch.
        first = (processes.rank - self.expert) % processes.size
        return Stream(self.expert, self.batches[first :: processes.size])

    @property
    def samples(self) -> tuple[int, ...]:
        return tuple(index for batch in self.batches for index in batch)


def token_batches(
    samples: Sequence[int],
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    price: float = BATCH_PRICE,
) -> list[Batch]:
    """Return batches of similar length: as few as keep padding under `MOST_PADDING`.

    Where the samples are too few for that, batches would become so small that their matrix
    products are slow: then it is what saves more, padding or batches.

    Args:
        samples: Indices of the samples.
        lengths: Tokens of every sample.
        batch_tokens: Upper bound of a batch's tokens, padding included; a longer sample is alone.
        price: A batch takes at least as long as this many tokens, however small it is.
    """
    order = sorted(samples, key=lambda index: (lengths[index], index))
    sizes = np.array([lengths[index] for index in order], dtype=np.int64)
    real = int(sizes.sum())
    # The dearer a batch, the fewer there are, and the more is padded.
    for asked in (price * 2**power for power in range(_PRICES - 1, -1, -1)):
        ends = _cuts(sizes, batch_tokens, asked)
        starts = [0, *ends][:-1]
        padded = sum(
            int(sizes[end - 1]) * (end - start) for start, end in zip(starts, ends, strict=True)
        )
        if padded - real <= MOST_PADDING * padded:
            break
    return [tuple(order[start:end]) for start, end in zip(starts, ends, strict=True)]


def _cuts(sizes: NDArray[np.int64], batch_tokens: int, price: float) -> list[int]:
    """Cut sorted lengths where padded tokens plus `price` per batch are least; where batches end."""
    count = len(sizes)
    best = np.zeros(count + 1)  # cost of the first so many samples
    start = np.zeros(count + 1, dtype=np.int64)  # of the batch that ends there
    for end in range(1, count + 1):
        longest = int(sizes[end - 1])
        least = max(0, end - max(1, batch_tokens // max(longest, 1)))
        padded = np.maximum(longest * np.arange(end - least, 0, -1), LEAST_TOKENS)
        costs = best[least:end] + padded + price
        # Of equals the first, which is the largest batch.
        start[end] = least + int(costs.argmin())
        best[end] = costs[start[end] - least]
    ends = []
    while count:
        ends.append(count)
        count = int(start[count])
    return ends[::-1]


class Rows:
    """Which rows of samples are kept, one after the other: all their tokens, or some.

    Args:
        lengths: Tokens of every sample; 0 for those that are another process's.
        width: Of a row.
        dtype: Of a row.
        every: One token of so many is kept, the same distance apart, at least one of a sample.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, *, every: int = 1
    ) -> None:
        self._every = every
        self.counts = [-(-length // every) for length in lengths]
        self._lengths = lengths
        self.offsets = [0, *itertools.accumulate(self.counts)]
        self.shape = (self.offsets[-1], width)
        self.dtype = dtype

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def span(self, sample: int) -> slice:
        """Return the rows of one sample."""
        return slice(self.offsets[sample], self.offsets[sample + 1])

    def pick(self, padded: Tensor, row: int, sample: int) -> Tensor:
        """Return what is kept of a sample's rows, (rows, width), out of a padded batch."""
        length, count = self._lengths[sample], self.counts[sample]
        if self._every == 1:
            return padded[row, :length]
        return padded[row, torch.linspace(0, length - 1, count).round().long()]


class PackedStates(Rows):
    """Rows of every sample, without padding: (num_rows, hidden_size).

    Kept in memory, or in a memory-mapped scratch file when larger than the budget.

    Args:
        lengths, width, dtype, every: See `Rows`.
        scratch: A folder for the file.
        budget_bytes: What may be kept in memory.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        scratch: Path,
        budget_bytes: float,
        every: int = 1,
    ) -> None:
        super().__init__(lengths, width, dtype, every=every)
        self._file: Path | None = None
        if self.num_bytes <= budget_bytes:
            self.rows = torch.empty(self.shape, dtype=dtype)
        else:
            check_space(scratch, self.num_bytes, "the router's hidden states")
            self._file = scratch / f"hidden-{id(self):x}.bin"
            # A hole in a mapped file kills the process when the disk is full: fill it first.
            reserve(self._file, self.num_bytes)
            mapped = torch.from_file(
                str(self._file), shared=True, size=self.shape[0] * width, dtype=dtype
            )
            self.rows = mapped.view(self.shape)

    def padded(self, batch: Batch) -> Tensor:
        """Return the rows of some samples, (samples, longest, hidden_size), zeros on the right."""
        spans = [self.span(index) for index in batch]
        longest = max(span.stop - span.start for span in spans)
        padded = torch.zeros(len(batch), longest, self.rows.shape[1], dtype=self.rows.dtype)
        for row, span in enumerate(spans):
            padded[row, : span.stop - span.start] = self.rows[span]
        return padded

    def put(self, batch: Batch, padded: Tensor) -> None:
        """Take the rows of some samples back, without their padding."""
        padded = padded.to(device="cpu", dtype=self.rows.dtype)
        for row, index in enumerate(batch):
            self.rows[self.span(index)] = self.pick(padded, row, index)

    def close(self) -> None:
        self.rows = torch.empty(0)
        if self._file:
            self._file.unlink(missing_ok=True)


class LayersOnDisk(Rows):
    """Rows of every sample in every layer, in files: nothing of them stays in memory.

    Args:
        lengths, width, dtype, every: See `Rows`.
        num_layers: How many files there are.
        folder: Where they are.
        name: What theirs begin with.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        num_layers: int,
        folder: Path,
        name: str,
        every: int = 1,
    ) -> None:
        super().__init__(lengths, width, dtype, every=every)
        self._files = [folder / f"{name}-{layer}.bin" for layer in range(num_layers)]
        for path in self._files:
            path.write_bytes(b"")
        self._missing = num_layers * sum(count > 0 for count in self.counts)

    @property
    def complete(self) -> bool:
        """Whether every sample's rows are there in every layer."""
        return self._missing == 0

    def put(self, layer: int, batch: Batch, padded: Tensor) -> None:
        """Keep the rows of some samples, (samples, longest, hidden_size); each once."""
        padded = padded.to(device="cpu", dtype=self.dtype)
        with self._files[layer].open("rb+") as file:
            for row, index in enumerate(batch):
                file.seek(self.offsets[index] * self.shape[1] * self.dtype.itemsize)
                file.write(tensor_memory(self.pick(padded, row, index).contiguous()))
        self._missing -= len(batch)

    def read(self, layer: int, into: PackedStates) -> None:
        """Fill the rows of all samples with those of a layer."""
        if self.num_bytes:
            with self._files[layer].open("rb") as file:
                file.readinto(tensor_memory(into.rows))

    def close(self) -> None:
        """Remove the files."""
        for path in self._files:
            path.unlink(missing_ok=True)
