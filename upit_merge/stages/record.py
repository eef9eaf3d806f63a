"""Which stages of a pipeline are done, and what they were done with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.resume import first_difference
from upit_merge.text_files import write_json

RECORD = "pipeline.json"


class Record:
    """A file in the pipeline's output folder, rewritten after every stage.

    Args:
        out: That folder, which may not exist yet.

    Raises:
        UpitError: the file is not one of ours.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / RECORD
        self._stages: dict[str, Any] = {}
        if not self._path.is_file():
            return
        try:
            self._stages = dict(json.loads(self._path.read_text(encoding="utf-8"))["stages"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UpitError(
                f"{self._path} is not the record of a pipeline ({error}); put it back, or choose "
                "another output folder."
            ) from None

    def is_done(self, stage: str, identity: Mapping[str, Any]) -> bool:
        """Whether a stage is done, with these settings.

        Raises:
            UpitError: it is, but with others.
        """
        if stage not in self._stages:
            return False
        before = self._stages[stage]["identity"]
        if change := first_difference(before, json.loads(json.dumps(identity))):
            raise UpitError(
                f"The stage {stage} is done in {self._path.parent}, but {change}; undo that, or "
                f"give --redo {stage} to do it and what follows again."
            )
        return True

    def seconds(self, stage: str) -> float | None:
        """What a stage took; None if it is not done."""
        return self._stages.get(stage, {}).get("seconds")

    def done(self, stage: str, identity: Mapping[str, Any], seconds: float) -> None:
        """A stage is done."""
        self._stages[stage] = {"identity": identity, "seconds": round(seconds, 1)}
        self._write()

    def forget(self, stage: str) -> None:
        """A stage is to be done again."""
        self._stages.pop(stage, None)
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"stages": self._stages})
