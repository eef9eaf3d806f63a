"""Safetensors files as byte ranges: read rows, replace tensors, hold nothing.

The `safetensors` library reads whole tensors through a memory map and writes whole files from
memory. A merge needs neither: it streams row blocks of many large files at once, and its memory
must not grow with them. The header is still checked by the library; only the bytes of the tensors
are read and written here, with plain positioned I/O.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from upit_merge.errors import UpitError, one_line, shown
from upit_merge.io.tensor_file import (
    DTYPES,
    Location,
    PositionedFile,
    TensorSpec,
    parts_of,
    raw_bytes,
    tensor_memory,
)
from upit_merge.io.untrusted import check_tensor_name


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file: all of a stored one, or rows of it as a matrix from `first` on.

    Attributes:
        stored: Name of the stored tensor.
        first: None where it is all of it.
    """

    stored: str
    first: int | None = None


def places_in(spec: TensorSpec) -> Iterator[tuple[str, Place]]:
    """Yield the tensors that a stored one holds, and where."""
    first = 0
    for part in parts_of(spec):
        yield part.name, Place(spec.name, None if part.shape == spec.shape else first)
        first += math.prod(part.shape[:-1])


class SafetensorsFile:
    """One open safetensors file, read by row ranges; thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locations = _header_locations(path)
        self._file = PositionedFile(path, "rb")
        self.specs = {name: location.spec for name, location in self._locations.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, in its stored dtype, shape (stop - start, ...)."""
        location = self._locations[name]
        spec = location.spec
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        if rows.numel():
            self._file.read(tensor_memory(rows), location.start + start * spec.row_bytes)
        return rows

    def rows_at(self, place: Place, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of what is at a place, in its stored dtype."""
        if place.first is None:
            return self.rows(place.stored, start, stop)
        return self.matrix_rows(place.stored, place.first + start, place.first + stop)

    def matrix_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor taken as a matrix: all its dimensions but the last
        are one, as they lie in the file."""
        location = self._locations[name]
        columns = location.spec.shape[-1]
        rows = torch.empty((stop - start, columns), dtype=location.spec.dtype)
        if rows.numel():
            offset = start * columns * location.spec.dtype.itemsize
            self._file.read(tensor_memory(rows), location.start + offset)
        return rows

    def close(self) -> None:
        self._file.close()


def patch_tensors(path: Path, tensors: Mapping[Place, torch.Tensor]) -> None:
    """Replace the values of some tensors of a safetensors file, in place, in their stored dtype.

    Args:
        tensors: By where they are.
    """
    locations = _header_locations(path)
    file = PositionedFile(path, "r+b")
    try:
        for place, tensor in tensors.items():
            location = locations[place.stored]
            itemsize = location.spec.dtype.itemsize
            offset = (place.first or 0) * location.spec.shape[-1] * itemsize
            file.write(raw_bytes(tensor, location.spec.dtype), location.start + offset)
        file.sync()
    finally:
        file.close()


def _header_locations(path: Path) -> dict[str, Location]:
    """Find where every tensor of the file lies.

    Raises:
        UpitError: the file is truncated or corrupt, or a tensor is not a floating-point one or has
            a name or shape that no model's tensor has.
    """
    try:
        # The library checks what a hostile or torn file could get wrong: the header's size,
        # offsets that overlap, leave holes or point past the end, shapes that do not fit.
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UpitError(
            f"{path} is truncated or corrupt ({one_line(error)}); copy or download it again."
        ) from error
    base, offsets = _data_offsets(path)
    locations = {}
    for name, (dtype_name, shape) in stored.items():
        check_tensor_name(path, name)
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise UpitError(
                f"{path} stores {name} as {dtype_name}, which cannot be merged; use the "
                f"unquantised checkpoint ({', '.join(DTYPES)})."
            )
        # A tensor without elements takes no bytes, whatever its other dimensions promise.
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > sys.maxsize:
            raise UpitError(
                f"{path} stores {name} in shape {shown(shape)}; do not use this checkpoint."
            )
        spec = TensorSpec(name, shape, dtype)
        start, end = offsets.get(name, (0, -1))
        if end - start != spec.num_bytes:
            raise _odd_header(path)
        locations[name] = Location(spec, base + start)
    return locations


def _data_offsets(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Find where the data begins, and first and last byte of every tensor in it.

    The library, which has accepted the header, does not tell offsets in all its releases. It also
    accepts spellings that nothing writes, such as a list in place of an entry's mapping.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        return 8 + length, {name: (start, end) for name, (start, end) in offsets.items()}
    except (OSError, struct.error, ValueError, TypeError, LookupError, RecursionError) as error:
        raise _odd_header(path) from error


def _odd_header(path: Path) -> UpitError:
    return UpitError(
        f"{path} has a header in a form that nothing writes; copy or download it again, or convert "
        "the checkpoint with the safetensors library."
    )
