"""Which stages of a pipeline are begun and done, and with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from upit_merge.errors import UpitError, one_line
from upit_merge.io.text_file import write_json
from upit_merge.output.identity import first_difference
from upit_merge.output.lock import LOCK

RECORD = "pipeline.json"


class _Entry(BaseModel):
    """Of one stage; `seconds` is what the call took that ended it."""

    identity: dict[str, Any]
    seconds: float | None = None
    done: bool = False


class _Entries(BaseModel):
    stages: dict[str, _Entry] = {}


class Record:
    """A file in the pipeline's output folder, rewritten before and after every stage.

    Only what it names is the pipeline's own, to be replaced or removed.

    Args:
        out: That folder, which exists.

    Raises:
        UpitError: the file is not one of ours, or there is none in a folder with other files.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / RECORD
        self._content = _Entries()
        if not self._path.is_file():
            others = sorted(path.name for path in out.iterdir() if path.name != LOCK)
            if others:
                raise UpitError(
                    f"The output folder {out} is not empty (it holds {one_line(others[0])}) and "
                    "not a pipeline's; choose a new one."
                )
            return
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._content = _Entries.model_validate(content)
        except (OSError, ValueError, ValidationError):
            raise UpitError(
                f"{self._path} is not the record of a pipeline; put it back, or choose another "
                "output folder."
            ) from None

    def knows(self, stage: str) -> bool:
        """Return whether a stage was begun."""
        return stage in self._content.stages

    def is_done(self, stage: str, identity: Mapping[str, Any]) -> bool:
        """Return whether a stage is done, with these settings.

        Raises:
            UpitError: it is, but with others.
        """
        entry = self._content.stages.get(stage)
        if entry is None or not entry.done:
            return False
        if change := first_difference(entry.identity, identity):
            raise UpitError(
                f"The stage {stage} is done in {self._path.parent}, but {change}; undo that, or "
                f"give --redo {stage} to do it and what follows again."
            )
        return True

    def was_begun(self, stage: str, identity: Mapping[str, Any]) -> bool:
        """Return whether a stage was begun with these settings."""
        entry = self._content.stages.get(stage)
        return entry is not None and first_difference(entry.identity, identity) is None

    def seconds(self, stage: str) -> float | None:
        """Return what a stage took; None if it is not done."""
        entry = self._content.stages.get(stage)
        return entry.seconds if entry else None

    def begin(self, stage: str, identity: Mapping[str, Any]) -> None:
        """Record that what a stage makes is the pipeline's from now on."""
        self._content.stages[stage] = _Entry(identity=dict(identity))
        self._write()

    def done(self, stage: str, identity: Mapping[str, Any], seconds: float) -> None:
        """Record that a stage is done."""
        entry = _Entry(identity=dict(identity), seconds=round(seconds, 1), done=True)
        self._content.stages[stage] = entry
        self._write()

    def forget(self, stage: str) -> None:
        """Let a stage be done again; to be called when what it made is gone."""
        self._content.stages.pop(stage, None)
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._content.model_dump(mode="json"))
