"""Tensors of a MoE folder, opened and replaced: gates, and experts that were trained."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.disk import check_space
from upit_merge.io.safetensors_file import Place, SafetensorsFile, patch_tensors
from upit_merge.io.sources import TensorSource
from upit_merge.io.tensor_file import TensorSpec

Tensors = Mapping[str, torch.Tensor]


def _patch(
    tensors: Tensors, file_of: Callable[[str], Path], place_of: Callable[[str], Place]
) -> None:
    """Replace tensors in their files, in place."""
    by_file: dict[Path, dict[Place, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        by_file[file_of(name)][place_of(name)] = tensor
    for path, part in by_file.items():
        patch_tensors(path, part)


@dataclass(frozen=True)
class InPlace:
    """A model whose tensors are replaced in place; for a folder that nobody uses yet."""

    moe: Checkpoint

    @property
    def source(self) -> TensorSource:
        return self.moe

    def write(self, tensors: Tensors) -> None:
        """Replace tensors."""
        _patch(tensors, self.moe.file_of, self.moe.place_of)


@dataclass(frozen=True)
class PatchedCopies:
    """Copies of a model's files in which tensors are replaced; the model itself stays as it is.

    Outputs of this program keep their gates in a file of their own (or are a single file), so
    that new gates take a small copy.

    The model as it will be: tensors are read from the copies where there are some.

    Args:
        moe: The model.
        folder: Receives the copies; those that are there already are gone on with.
    """

    moe: Checkpoint
    folder: Path

    @property
    def label(self) -> str:
        return self.moe.label

    @property
    def config(self) -> Mapping[str, Any]:
        return self.moe.config

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.moe.specs

    def copy_of(self, name: str) -> Path:
        """Return where the copy of a tensor's file is, or will be."""
        return self.folder / self.moe.file_of(name).name

    def place_of(self, name: str) -> Place:
        """Return where in that file the tensor is."""
        return self.moe.place_of(name)

    @property
    def obsolete(self) -> tuple[str, ...]:
        """Return the names of the model's files that the copies make superfluous."""
        return ()

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor in its stored dtype, on the CPU."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) of a tensor in its stored dtype, on the CPU."""
        copy = self.copy_of(name)
        if not copy.exists():
            return self.moe.rows(name, start, stop)
        with contextlib.closing(SafetensorsFile(copy)) as file:
            return file.rows_at(self.place_of(name), start, stop)

    @property
    def source(self) -> TensorSource:
        return self

    def prepare(self, names: Iterable[str]) -> None:
        """Copy the files that hold these tensors.

        Raises:
            UpitError: the copies do not fit the disk.
        """
        files = {self.moe.file_of(name) for name in names}
        missing = [path for path in sorted(files) if not (self.folder / path.name).exists()]
        size = sum(path.stat().st_size for path in missing)
        check_space(self.folder, size, "a copy of the files that change")
        for path in missing:
            draft = self.folder / f".{path.name}.draft"
            shutil.copyfile(path, draft)
            os.replace(draft, self.folder / path.name)

    def write(self, tensors: Tensors) -> None:
        """Replace tensors in the copies, which must have been prepared."""
        _patch(tensors, self.copy_of, self.place_of)
