"""A demo's folder: whose it is, and what is done in it, so that the same command goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upit_merge import __version__
from upit_merge.errors import UpitError
from upit_merge.io.text_file import read_record, write_json
from upit_merge.output.identity import first_difference

_RECORD = ".demo.json"
_TRAINING = ".training.pt"


@dataclass(frozen=True)
class DemoFolder:
    """A folder that holds a demo, finished or not.

    Attributes:
        root: The folder.
    """

    root: Path

    def training(self) -> dict[str, Any]:
        """Return how far the training is; empty if it has not left anything."""
        path = self.root / _TRAINING
        return torch.load(path, weights_only=True) if path.is_file() else {}

    def keep_training(self, state: dict[str, Any]) -> None:
        """Record how far the training is; the models that it speaks of are written."""
        draft = self.root / f"{_TRAINING}.draft"  # never half there
        torch.save(state, draft)
        draft.replace(self.root / _TRAINING)

    def forget_training(self) -> None:
        """Remove the record of a training that is done and used."""
        (self.root / _TRAINING).unlink(missing_ok=True)


def open_demo(folder: Path, **identity: Any) -> DemoFolder:
    """Make a folder for a demo, or take the one that an earlier call has begun.

    Args:
        identity: What decides the demo's results.

    Raises:
        UpitError: there is something else in it, or a demo with another identity.
    """
    identity = {"upit-merge": __version__, **identity}
    record = folder / _RECORD
    if record.is_file():
        if change := first_difference(read_record(record), identity):
            raise UpitError(
                f"The folder {folder} holds another demo: {change}; undo that, or give a new "
                "folder."
            )
        return DemoFolder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UpitError(f"The folder {folder} is not empty; give a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, identity)
    return DemoFolder(folder)
