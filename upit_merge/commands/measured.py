"""What was measured is kept for the next call, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upit_merge import __version__
from upit_merge.errors import UpitError
from upit_merge.io.tensor_file import tensor_memory
from upit_merge.io.untrusted import own_file

LOG = logging.getLogger(__name__)

# Raised whenever the same models and samples give other numbers than before.
_MEASUREMENT = 3
# What computes; the last four, where they are installed, instead of torch for some layers.
_COMPUTES = (
    *("transformers", "numpy", "scipy"),
    *("flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels"),
)
# The oldest go.
_MOST_FILES = 200
_MOST_BYTES = 2_000_000_000


def cache_folder() -> Path:
    """Return where it is kept: $UPIT_MERGE_CACHE, or `upit-merge` beside the Hub's own cache.

    Raises:
        RuntimeError: the home folder it begins with is nobody's.
    """
    if own := os.environ.get("UPIT_MERGE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "upit-merge"


@dataclass(frozen=True)
class Measured:
    """What is kept of a measurement.

    Attributes:
        tensors: Its numbers, by name.
        facts: What is to be said of them, as JSON has it.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return SHA-256 of all of it: of a file that was damaged no number is believed."""
        found = hashlib.sha256(json.dumps(self.facts).encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor_memory(tensor))
        return found.hexdigest()


def kept(identity: Mapping[str, Any]) -> Measured | None:
    """Return what was kept under this identity; None if there is nothing, or nothing whole."""
    try:
        path = _path(identity)
        own_file(path, path.parent)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = Measured(tensors, json.loads(facts["facts"]))
    except (OSError, SafetensorError, UpitError, ValueError, RuntimeError, KeyError):
        return None
    return found if found.digest() == facts.get("sha256") else None


def keep(identity: Mapping[str, Any], measured: Measured) -> None:
    """Keep what was measured; where nothing can be written, nothing is."""
    try:
        path = _path(identity)
    except RuntimeError as error:
        LOG.debug("Nothing is kept (%s)", error)
        return
    tensors = {name: tensor.contiguous() for name, tensor in measured.tensors.items()}
    measured = Measured(tensors, measured.facts)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"facts": json.dumps(measured.facts), "sha256": measured.digest()}
        save_file(tensors, draft, facts)
        os.replace(draft, path)
        _drop_the_oldest(path.parent)
    except (OSError, SafetensorError, ValueError) as error:
        LOG.debug("%s is not kept (%s)", path, error)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _drop_the_oldest(folder: Path) -> None:
    states = [(path, path.lstat()) for path in folder.iterdir()]
    files = [(path, state) for path, state in states if stat.S_ISREG(state.st_mode)]
    total = 0
    newest_first = sorted(files, key=lambda file: -file[1].st_mtime_ns)
    for number, (path, state) in enumerate(newest_first, 1):
        total += state.st_size
        if number > _MOST_FILES or total > _MOST_BYTES:
            path.unlink(missing_ok=True)


def _path(identity: Mapping[str, Any]) -> Path:
    made_by = {"upit-merge": __version__, "measurement": _MEASUREMENT, "torch": torch.__version__}
    text = json.dumps({**made_by, **dict(_versions(_COMPUTES)), **identity}, sort_keys=True)
    return cache_folder() / "losses" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _versions(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)
