"""What is done of a training run, in its output folder, so that it can be cut off and go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.io.text_file import read_record, write_json
from upit_merge.output.identity import first_difference
from upit_merge.output.lock import LOCK

_STATE = ".upit-finetune.json"
_GONE = ".removed-checkpoint-"
# Of a checkpoint: what training needs to go on from it, as large as two or three models.
_FOR_RESUMING = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "training_args.bin",
    "pytorch_model_fsdp*",
)


class RunState:
    """A record beside the checkpoints, rewritten whenever one is complete.

    Checkpoints that are not in it were being written when the process was killed.

    Args:
        folder: The output folder, which exists.
        identity: What decides the result.

    Raises:
        UpitError: the folder holds another run, or other files.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / _STATE
        self._identity = json.loads(json.dumps(identity))
        self._content = self._read()

    @property
    def is_finished(self) -> bool:
        return bool(self._content["finished"])

    @property
    def seconds(self) -> float:
        """Time spent up to the last checkpoint."""
        return float(self._content["seconds"])

    @property
    def newest(self) -> Path | None:
        """The last complete checkpoint, the one that can be gone on from.

        Raises:
            UpitError: somebody has removed it.
        """
        if not self._content["saved"]:
            return None
        path = self._checkpoint(max(self._content["saved"]))
        if not path.is_dir():
            raise UpitError(
                f"{path} is gone, from which the run would go on; put it back, or delete "
                f"{self.folder} to start over."
            )
        return path

    def _read(self) -> dict[str, Any]:
        new = {"identity": self._identity, "saved": [], "seconds": 0.0, "finished": False}
        content = read_record(self._path)
        if not content.keys() >= new.keys():
            others = sorted(p.name for p in self.folder.iterdir() if p.name != LOCK)
            if others:
                raise UpitError(
                    f"The output folder {self.folder} is not empty (it holds {others[0]}); choose "
                    "a new one."
                )
            return new
        if not (content["finished"] or content["saved"]):
            return new  # nothing is lost by starting over
        if content["finished"]:
            if content["identity"] != self._digest():
                raise UpitError(
                    f"The output folder {self.folder} holds the result of a run with other "
                    "settings; choose a new one."
                )
        elif change := first_difference(content["identity"], self._identity):
            raise UpitError(
                f"The output folder {self.folder} holds an unfinished run, but {change}; undo that "
                "to finish it, or delete the folder to start over."
            )
        return content

    def begin(self) -> None:
        """Record that the run has begun; remove what it was writing when it was killed."""
        write_json(self._path, self._content)
        complete = {self._checkpoint(step) for step in self._content["saved"]}
        for path in [*self.folder.glob("checkpoint-*"), *self.folder.glob(f"{_GONE}*")]:
            if path not in complete:
                shutil.rmtree(path)

    def abandon(self) -> None:
        """Leave nothing of a run that ended early, unless it has a checkpoint to go on from."""
        if not (self._content["saved"] or self.is_finished):
            self._path.unlink(missing_ok=True)

    def saved(self, step: int, seconds: float, limit: int | None = None) -> None:
        """Record a complete checkpoint: only it needs what training goes on from.

        Args:
            seconds: Since the run began, earlier calls included.
            limit: Keep so many checkpoints. The record is written before one is removed, so that
                whatever is in it is whole; transformers' own rotation comes before the record.
        """
        everyone = sorted({*self._content["saved"], step})
        kept = everyone[-limit:] if limit else everyone
        self._content |= {"saved": kept, "seconds": seconds}
        write_json(self._path, self._content)
        for old in everyone:
            if old not in kept:
                self._remove(old)
            elif old != step:
                self._strip(old)

    def finish(self, *, keep_checkpoints: bool) -> None:
        """Record that the result is in place; what is left is for other people to see."""
        # Without the identity itself, which names folders of this machine.
        self._content |= {"finished": True, "identity": self._digest()}
        write_json(self._path, self._content)
        self.tidy(keep_checkpoints=keep_checkpoints)

    def tidy(self, *, keep_checkpoints: bool) -> None:
        """Remove what only the run itself needed."""
        for step in self._content["saved"]:
            if keep_checkpoints:
                self._strip(step)
            else:
                self._remove(step)

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _remove(self, step: int) -> None:
        """Remove a checkpoint; out of sight first, as half of one looks like one."""
        path, gone = self._checkpoint(step), self.folder / f"{_GONE}{step}"
        if path.is_dir():
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _strip(self, step: int) -> None:
        for pattern in _FOR_RESUMING:
            for path in self._checkpoint(step).glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
