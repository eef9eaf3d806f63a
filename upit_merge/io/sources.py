"""What a model is read through, whatever it is on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from upit_merge.io.tensor_file import TensorSpec


class TensorSource(Protocol):
    """What a model is computed from: its configuration and its tensors by name, read when asked."""

    @property
    def label(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, in its stored dtype or a wider one."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor on the CPU, in its stored dtype or a wider one."""


class DenseModel(TensorSource, Protocol):
    """An input of a merge: a complete checkpoint, or an adapter on one."""

    @property
    def folder(self) -> Path:
        """Where its tokenizer is, if it has one."""

    @property
    def config(self) -> dict[str, Any]: ...

    def files(self) -> list[Path]:
        """Return the files that decide its weights."""

    def small_file(self, name: str) -> Path:
        """Return where a file of its settings is, if it has one."""

    def close(self) -> None: ...
