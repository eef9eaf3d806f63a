"""Hidden states of many samples without padding, and the batches in which they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upit_merge.io.disk import check_space, reserve
from upit_merge.runtime.processes import Processes

MEAN = -1  # stands for the expert whose FFN is the mean of all

Batch = tuple[int, ...]  # indices of samples


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
    samples: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> Iterator[Batch]:
    """Batches of similar length with at most `batch_tokens` tokens, padding included."""
    batch: list[int] = []
    for index in sorted(samples, key=lambda index: (lengths[index], index)):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)


class PackedStates:
    """One row per token of every sample, without padding: (num_tokens, hidden_size).

    Kept in memory, or in a memory-mapped scratch file when larger than the budget.

    Args:
        lengths: Tokens of every sample; 0 for those that are another process's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        scratch: Path,
        budget_bytes: float,
    ) -> None:
        self.offsets = [0]
        for length in lengths:
            self.offsets.append(self.offsets[-1] + length)
        shape = (self.offsets[-1], width)
        num_bytes = shape[0] * width * dtype.itemsize
        self._file: Path | None = None
        if num_bytes <= budget_bytes:
            self.rows = torch.empty(shape, dtype=dtype)
        else:
            check_space(scratch, num_bytes, "the router's hidden states")
            self._file = scratch / f"hidden-{id(self):x}.bin"
            # A hole in a mapped file kills the process when the disk is full: fill it first.
            reserve(self._file, num_bytes)
            mapped = torch.from_file(
                str(self._file), shared=True, size=shape[0] * width, dtype=dtype
            )
            self.rows = mapped.view(shape)

    def span(self, sample: int) -> slice:
        """Return the rows of one sample."""
        return slice(self.offsets[sample], self.offsets[sample + 1])

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
            span = self.span(index)
            self.rows[span] = padded[row, : span.stop - span.start]

    def close(self) -> None:
        self.rows = torch.empty(0)
        if self._file:
            self._file.unlink(missing_ok=True)
