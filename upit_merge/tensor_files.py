"""Safetensors files as byte ranges: read rows, write rows, hold nothing.

The `safetensors` library reads whole tensors through a memory map and writes whole files from
memory. A merge needs neither: it streams row blocks of many large files at once, and its memory
must not grow with them. The header is still checked by the library; only the bytes of the tensors
are read and written here, with plain positioned I/O.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from upit_merge.errors import UpitError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The header is padded to this many bytes so that tensors start aligned, as the library does it.
_ALIGNMENT = 8


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
class _Location:
    spec: TensorSpec
    start: int  # absolute offset in the file, in bytes


def _header_locations(path: Path) -> dict[str, _Location]:
    """Where every tensor of the file lies.

    Raises:
        UpitError: the file is truncated or corrupt, or a tensor is not a floating-point one.
    """
    try:
        # The library checks what a hostile or torn file could get wrong: the header's size,
        # offsets that overlap, leave holes or point past the end, shapes that do not fit.
        with safe_open(str(path), framework="pt") as _:
            pass
    except (SafetensorError, OSError) as error:
        raise UpitError(
            f"{path} is truncated or corrupt ({error}); copy or download it again."
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    locations = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UpitError(
                f"{path} stores {name} as {entry['dtype']}, which cannot be merged; use the "
                f"unquantised checkpoint ({', '.join(DTYPES)})."
            )
        start, _end = entry["data_offsets"]
        spec = TensorSpec(name, tuple(entry["shape"]), dtype)
        locations[name] = _Location(spec, 8 + length + start)
    return locations


class _PositionedFile:
    """Reads and writes at absolute offsets, from any thread, on every operating system."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._lock = threading.Lock()

    def read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not count:
                    raise UpitError(
                        f"{self.path} became shorter while it was being read; check that no other "
                        "program is writing it and try again."
                    )
                done += count

    def write(self, data: memoryview, offset: int) -> None:
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(data):
                done += self._file.write(data[done:])

    def resize(self, num_bytes: int) -> None:
        self._file.truncate(num_bytes)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class SafetensorsFile:
    """One open safetensors file, read by row ranges; thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locations = _header_locations(path)
        self._file = _PositionedFile(path, "rb")
        self.specs = {name: location.spec for name, location in self._locations.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its stored dtype, shape (stop - start, ...)."""
        location = self._locations[name]
        spec = location.spec
        shape = (stop - start, *spec.shape[1:])
        buffer = bytearray((stop - start) * spec.row_bytes)
        if not buffer:
            return torch.empty(shape, dtype=spec.dtype)
        self._file.read(memoryview(buffer), location.start + start * spec.row_bytes)
        return torch.frombuffer(buffer, dtype=spec.dtype).view(shape)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name and its tensors, in file order."""

    filename: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)


def plan_shards(
    groups: Iterable[Iterable[TensorSpec]], max_shard_bytes: int, stem: str = "model"
) -> tuple[Shard, ...]:
    """Distribute tensors over shards, in order; pure planning, nothing is written.

    Everything that fits one shard becomes a single `model.safetensors`. Otherwise every group
    starts a new shard: the gates are a group of their own, so that a router can be replaced
    later by replacing one small file.

    Args:
        groups: Tensors in file order, in groups that do not share a shard.
        max_shard_bytes: Upper bound of a shard; a larger tensor gets a shard to itself.
    """
    listed = [list(group) for group in groups]
    everything = [spec for group in listed for spec in group]
    if sum(spec.num_bytes for spec in everything) <= max_shard_bytes:
        return (Shard(f"{stem}.safetensors", tuple(everything)),)
    contents: list[list[TensorSpec]] = []
    for group in listed:
        size = None
        for spec in group:
            if size is None or size + spec.num_bytes > max_shard_bytes:
                contents.append([])
                size = 0
            contents[-1].append(spec)
            size += spec.num_bytes
    total = len(contents)
    if total == 1:
        return (Shard(f"{stem}.safetensors", tuple(contents[0])),)
    return tuple(
        Shard(f"{stem}-{index:05d}-of-{total:05d}.safetensors", tuple(specs))
        for index, specs in enumerate(contents, start=1)
    )


def shard_index(shards: Iterable[Shard]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    shards = list(shards)
    return {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {spec.name: shard.filename for shard in shards for spec in shard.tensors},
    }


def _encode_header(tensors: Iterable[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in tensors:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    padding = -len(encoded) % _ALIGNMENT
    encoded += b" " * padding
    return struct.pack("<Q", len(encoded)) + encoded


class ShardWriter:
    """Files of known size, filled in any order, by any number of threads.

    Shapes are known before the first weight is, so every header is written first and every row
    block goes straight to its final offset: memory holds the block, never a tensor or a shard.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self._locations: dict[str, tuple[_PositionedFile, _Location]] = {}
        self._files: list[_PositionedFile] = []
        self._rows_left: dict[str, int] = {}
        self._lock = threading.Lock()
        for shard in self.shards:
            self._create(shard)

    def _create(self, shard: Shard) -> None:
        header = _encode_header(shard.tensors)
        file = _PositionedFile(self.folder / shard.filename, "w+b")
        self._files.append(file)
        file.write(memoryview(header), 0)
        offset = len(header)
        for spec in shard.tensors:
            self._locations[spec.name] = (file, _Location(spec, offset))
            self._rows_left[spec.name] = spec.shape[0]
            offset += spec.num_bytes
        file.resize(offset)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is written in."""
        return self._locations[name][1].spec.dtype

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor, beginning at row `start`; cast to the planned dtype."""
        file, location = self._locations[name]
        file.write(
            _raw_bytes(rows, location.spec.dtype), location.start + start * location.spec.row_bytes
        )
        with self._lock:
            self._rows_left[name] -= rows.shape[0]

    def finish(self) -> None:
        """Flush to the disk and close.

        Raises:
            RuntimeError: a planned tensor was not written completely (a defect of this program).
        """
        unwritten = [name for name, left in self._rows_left.items() if left != 0]
        if unwritten:
            raise RuntimeError(f"{len(unwritten)} tensors are incomplete, first {unwritten[0]}")
        for file in self._files:
            file.sync()
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the files are the caller's to remove; only a clean exit may finish them.
        if kind is None:
            self.finish()
        else:
            self.close()


def patch_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the values of some tensors of a safetensors file, in place, in their stored dtype."""
    locations = _header_locations(path)
    file = _PositionedFile(path, "r+b")
    try:
        for name, tensor in tensors.items():
            location = locations[name]
            file.write(_raw_bytes(tensor, location.spec.dtype), location.start)
        file.sync()
    finally:
        file.close()


def _raw_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.to(device="cpu", dtype=dtype).contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
