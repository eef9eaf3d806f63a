"""Tensors in files: what one is there, its bytes read and written at offsets, blocks of rows."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from upit_merge.errors import UpitError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_COMPARED_ELEMENTS = 1 << 20
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is somewhere on disk or will be."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, i.e. of one index along the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredSpec(TensorSpec):
    """A tensor as it is stored, where that is not the tensor that is spoken of.

    Attributes:
        parts: What it holds, one after the other, as it lies in the file: a tensor under another
            name, or the matrices of several experts.
    """

    parts: tuple[TensorSpec, ...] = ()


def parts_of(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """Return the tensors that a stored one holds; most hold themselves."""
    return spec.parts if isinstance(spec, StoredSpec) else (spec,)


@dataclass(frozen=True)
class Location:
    """Where the bytes of a tensor begin."""

    spec: TensorSpec
    start: int  # absolute offset in the file, in bytes


class PositionedFile:
    """Reads and writes at absolute offsets, from any thread, on every operating system."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._lock = threading.Lock()

    def read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if not count:
                raise UpitError(
                    f"{self.path} became shorter while it was being read; check that no other "
                    "program is writing it and try again."
                )
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        done = 0
        # One at a time: the kernel would let the second writer of a file wait busily.
        with self._lock:
            while done < len(data):
                done += self._write_some(data[done:], offset + done)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:  # seeking and reading are two steps here
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0  # type: ignore[attr-defined]

    def _write_some(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), data, offset)
        self._file.seek(offset)
        return self._file.write(data)

    def resize(self, num_bytes: int) -> None:
        self._file.truncate(num_bytes)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; 10 to 20 times as fast as `isfinite` on a CPU."""
    return not tensor.numel() or all(torch.stack(tensor.aminmax()).isfinite().tolist())


def raw_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """Return the bytes of a tensor, cast to a dtype, as a file holds them."""
    return tensor_memory(tensor.to(device="cpu", dtype=dtype).contiguous())


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's own memory; what is written there is in the tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def row_blocks(spec: TensorSpec, max_elements: int) -> Iterator[tuple[int, int]]:
    """Yield row ranges [start, stop) that cover a tensor in blocks of about `max_elements`."""
    rows = spec.shape[0]
    per_row = max(1, spec.numel // max(1, rows))
    step = max(1, max_elements // per_row)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class Rows(Protocol):
    """Has tensors by name, read row by row."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...


def equal_tensors(source: Rows, first: str, second: str) -> bool:
    """Return whether two tensors have the same shape and values, looked at block by block."""
    if source.specs[first].shape != source.specs[second].shape:
        return False
    for start, stop in row_blocks(source.specs[first], _COMPARED_ELEMENTS):
        ours, theirs = (source.rows(name, start, stop) for name in (first, second))
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return False
    return True
