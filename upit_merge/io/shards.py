"""The output's weights: which tensor goes where, and files filled in any order."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from upit_merge.io.tensor_file import (
    DTYPE_NAMES,
    Location,
    PositionedFile,
    TensorSpec,
    parts_of,
    raw_bytes,
)

# The header is padded to this many bytes so that tensors start aligned, as the library does it.
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # of the length of the header, at the start of the file


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name and its tensors as they are stored, in file order."""

    filename: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def parts(self) -> list[TensorSpec]:
        """What is written into it, tensor by tensor: the parts of those that have several."""
        return [part for spec in self.tensors for part in parts_of(spec)]


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
    """Return the content of `model.safetensors.index.json`."""
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
    A file is no safetensors file before `finish`: the length of its header, its first bytes, is
    written last, so that nobody takes a half-filled shard for weights.

    What is written are the parts of stored tensors, by their own names.

    Args:
        folder: Where the files are; those that are there already are continued.
        shards: The files to write.
        written: Names of tensors that are in the files already, from an earlier run; a file that
            is not there any more, or has another size, is written anew all the same.
    """

    def __init__(
        self, folder: Path, shards: Iterable[Shard], written: Collection[str] = ()
    ) -> None:
        self._locations: dict[str, tuple[PositionedFile, Location]] = {}
        self._files: dict[PositionedFile, bytes] = {}
        self._rows_left: dict[str, int] = {}
        self._lock = threading.Lock()
        for shard in shards:
            self._open(folder / shard.filename, shard, written)

    def _open(self, path: Path, shard: Shard, written: Collection[str]) -> None:
        header = _encode_header(shard.tensors)
        size = len(header) + shard.num_bytes
        intact = path.is_file() and path.stat().st_size == size
        file = PositionedFile(path, "r+b" if intact else "w+b")
        self._files[file] = header
        file.write(memoryview(bytes(_LENGTH_BYTES) + header[_LENGTH_BYTES:]), 0)
        file.resize(size)
        offset = len(header)
        for part in shard.parts:
            self._locations[part.name] = (file, Location(part, offset))
            done = intact and part.name in written
            self._rows_left[part.name] = 0 if done else part.shape[0]
            offset += part.num_bytes

    def wants(self, name: str) -> bool:
        """Return whether this tensor is in one of the files and not written yet."""
        return self._rows_left.get(name, 0) > 0

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor is written in."""
        return self._locations[name][1].spec.dtype

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor, beginning at row `start`; cast to the planned dtype."""
        file, location = self._locations[name]
        file.write(
            raw_bytes(rows, location.spec.dtype), location.start + start * location.spec.row_bytes
        )
        with self._lock:
            self._rows_left[name] -= rows.shape[0]

    def sync(self) -> None:
        """Flush what was written to the disk."""
        for file in self._files:
            file.sync()

    def finish(self) -> None:
        """Make them safetensors files, flush them to the disk and close them.

        Raises:
            RuntimeError: a planned tensor was not written completely (a defect of this program).
        """
        unwritten = [name for name, left in self._rows_left.items() if left != 0]
        if unwritten:
            raise RuntimeError(f"{len(unwritten)} tensors are incomplete, first {unwritten[0]}")
        self.sync()
        for file, header in self._files.items():
            file.write(memoryview(header[:_LENGTH_BYTES]), 0)
            file.sync()
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[0].close()

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
