"""Commands that change a model that is there: prepared aside, moved into place last."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from upit_merge.errors import ResumableError, UpitError
from upit_merge.output.lock import exclusive, release
from upit_merge.output.staging import (
    EDIT_STAGING,
    Staging,
    check_not_half_edited,
    check_output_exists,
    move_into_place,
    remove_scratch,
)
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.processes import ALONE, Processes

IDENTITY = "identity.json"


class Edit:
    """A change to a model, in a hidden folder inside the model's own.

    Args:
        out: The model.
        command: Which one changes it.
        processes: Who takes part; the first does all of the below.

    Attributes:
        out, command: As given.
        finished: The identity of an earlier call that was complete but for its last files, which
            are in place now; else None.
    """

    def __init__(self, out: Path, command: str, processes: Processes = ALONE) -> None:
        self.out = out
        self.command = command
        self.processes = processes
        self.staging = Staging(out / EDIT_STAGING[command])
        self.finished: dict[str, Any] | None = None

    @property
    def model(self) -> Path:
        """The files that will take the place of the model's own."""
        return self.staging.model

    def emptied(self) -> Path:
        """Return `model`, without what a call that was killed has left in it."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir(parents=True)
        return self.model

    @property
    def progress(self) -> Path:
        """What is done of the work, for a call that was cut off."""
        return self.staging.root / "progress"

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the model's lock, and finish what an earlier call had all but finished.

        Raises:
            UpitError: `out` is no folder, is in use, or half changed by another command.
        """
        check_output_exists(self.out)
        check_not_half_edited(self.out, self.command)
        with exclusive(self.out):
            self.finished = self._moved()
            yield

    def was_finished(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the earlier call that was all but finished is this one; says so."""
        same = self.processes.gather(self.finished)[0] == identity
        if same and self.processes.is_first:
            print("The earlier call was complete but for the last files, now in place.")
        return same

    @contextlib.contextmanager
    def interruptible(self, unchanged: str, *, keeps_files: bool = False) -> Iterator[None]:
        """Do the work inside: what is kept of it if it is cut off, and what is said then.

        Args:
            unchanged: What is as it was, in words.
            keeps_files: Prepared files are part of what the same command goes on with.
        """

        def on_exit() -> str:
            remove_scratch(self.out, self.processes.rank)
            if not self.processes.is_first:
                return ""
            release(self.out)
            if self.staging.is_moving:
                return "Interrupted; the same command goes on from there."
            if has_begun(self.progress):
                return f"Interrupted; {unchanged}. The same command goes on."
            shutil.rmtree(self.staging.root, ignore_errors=True)
            return f"Interrupted; {unchanged}."

        try:
            with ends_at_once(on_exit):
                yield
        except Exception as error:
            # A mistake would be made again by the same command; else it goes on, if it has begun.
            mistake = isinstance(error, UpitError) and not isinstance(error, ResumableError)
            if not self.staging.is_moving:
                if mistake or not has_begun(self.progress):
                    shutil.rmtree(self.staging.root, ignore_errors=True)
                elif not keeps_files:
                    shutil.rmtree(self.model, ignore_errors=True)
            raise

    def put_into_place(self, identity: Mapping[str, Any], obsolete: Sequence[str] = ()) -> None:
        """Let the prepared files become the model's.

        With `config.json` among them, the model does not load until all are there.

        Args:
            identity: What made them, for `finished` to tell.
            obsolete: Names of the model's files that go.
        """
        self.staging.begin_moving(identity, obsolete)
        self._moved()

    def _moved(self) -> dict[str, Any] | None:
        if not self.staging.is_moving:
            return None
        identity: dict[str, Any] = self.staging.state["identity"]
        move_into_place(self.staging, self.out)
        return identity


def has_begun(folder: Path) -> bool:
    """Return whether anything is kept there that a stage could go on with."""
    return folder.is_dir() and any(path.name != IDENTITY for path in folder.iterdir())
