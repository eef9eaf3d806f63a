"""The gates of a Mixtral folder: opened, replaced."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from upit_merge.checkpoints import Checkpoint, OpenOptions
from upit_merge.mixtral import gate_tensor
from upit_merge.staging import require_space
from upit_merge.tensor_files import patch_tensors, raw_bytes


@contextlib.contextmanager
def opened_moe(
    folder: Path, label: str = "the output", config: dict[str, Any] | None = None
) -> Iterator[Checkpoint]:
    """Open a Mixtral folder for reading; closes it again.

    Args:
        config: The content of its `config.json`, if that is not written yet.
    """
    with contextlib.closing(Checkpoint(label, folder, OpenOptions(), config=config)) as moe:
        yield moe


def gates_digest(gates: Sequence[torch.Tensor], dtype: torch.dtype) -> str:
    """SHA-256 of all gates as they are stored, layer after layer."""
    digest = hashlib.sha256()
    for gate in gates:
        digest.update(raw_bytes(gate, dtype))
    return digest.hexdigest()


def _gates_by_file(
    moe: Checkpoint, gates: Sequence[torch.Tensor]
) -> dict[Path, dict[str, torch.Tensor]]:
    by_file: dict[Path, dict[str, torch.Tensor]] = defaultdict(dict)
    for layer, gate in enumerate(gates):
        by_file[moe.file_of(gate_tensor(layer))][gate_tensor(layer)] = gate
    return by_file


def write_gates(moe: Checkpoint, gates: Sequence[torch.Tensor]) -> None:
    """Overwrite the gates in place; for a folder that nobody uses yet.

    Args:
        gates: (num_experts, hidden_size) per layer.
    """
    for path, tensors in _gates_by_file(moe, gates).items():
        patch_tensors(path, tensors)


def replace_gates(folder: Path, staging: Path, gates: Sequence[torch.Tensor]) -> None:
    """Replace the gates of a model that is in use: each file is copied, changed, swapped in whole.

    Outputs of this program keep their gates in a file of their own (or are a single file), so
    that the copy is small and the swap is one rename.

    Args:
        staging: A folder on the same disk for the copies.

    Raises:
        UpitError: the copies do not fit the disk.
    """
    with opened_moe(folder) as moe:
        by_file = _gates_by_file(moe, gates)
    require_space(
        staging, sum(p.stat().st_size for p in by_file), "a copy of the files with the gates"
    )
    for path, tensors in by_file.items():
        shutil.copyfile(path, staging / path.name)
        patch_tensors(staging / path.name, tensors)
    for path in by_file:
        os.replace(staging / path.name, path)
