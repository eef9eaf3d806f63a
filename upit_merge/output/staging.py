"""The output folder: built aside, moved into place last, never half there."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upit_merge.errors import ResumableError, UpitError
from upit_merge.io.disk import explained
from upit_merge.io.text_file import read_record, sync_folder, write_json
from upit_merge.io.untrusted import TEMPLATE_FOLDER, is_output_name, read_json
from upit_merge.output.identity import first_difference
from upit_merge.output.journal import has_progress
from upit_merge.output.lock import LOCK, exclusive, release
from upit_merge.runtime.interrupt import ends_at_once

LOG = logging.getLogger(__name__)

STAGING = ".upit-staging"
# Of the commands that change a model that is there.
_EDITS = ("router", "extend", "shrink", "evaluate", "page", "inspect")
EDIT_STAGING = {name: f".upit-{name}" for name in _EDITS}
REPORT = "upit_report.json"
_STATE = "run.json"


@dataclass(frozen=True)
class Staging:
    """The hidden folder inside the output folder in which the output is built.

    Attributes:
        root: Holds the state of the run and its journals.
    """

    root: Path

    @property
    def model(self) -> Path:
        """The files that will be the output."""
        return self.root / "model"

    @property
    def state(self) -> dict[str, Any]:
        """What decides the output, and the move once it has begun; empty if nothing is staged."""
        return read_record(self.root / _STATE)

    @property
    def is_moving(self) -> bool:
        """Whether all is done but for moving the files into place."""
        return bool(self.state.get("moving"))

    def begin(self, identity: Mapping[str, Any] | None = None) -> None:
        """Make the folder for the output of this identity."""
        self.model.mkdir(parents=True)
        write_json(self.root / _STATE, {"identity": identity, "moving": None})

    def begin_moving(self, identity: Mapping[str, Any] | None, obsolete: Sequence[str]) -> None:
        """Record that the output is complete; from now on its files are moved, whatever happens.

        Args:
            obsolete: Names of files that go from the output's folder.
        """
        _sync(self.model)
        moving = {"obsolete": list(obsolete)}
        write_json(self.root / _STATE, {"identity": identity, "moving": moving})

    def size(self) -> int:
        """Return the bytes of the output that are on the disk; shards have holes until filled."""
        stats = [path.stat() for path in self.model.iterdir()]
        return sum(getattr(stat, "st_blocks", 0) * 512 for stat in stats)


@contextlib.contextmanager
def staged_output(
    out: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool | None = False,
    outside: Path | None = None,
) -> Iterator[Staging]:
    """Give a folder to build in; on success its files become those of `out`, else nothing does.

    The staging folder is inside `out`, hence on the same disk: moving is renaming. `config.json`
    comes last, so that an interrupted move does not leave a folder that loads as a model. What a
    killed run has done is found again by the next one with the same identity; so is what was done
    before the disk was full or Ctrl-C was pressed. After other errors nothing is left.

    Args:
        out: The output folder; created if needed.
        identity: What decides the output, see `commands.finished.run_identity`.
        overwrite, outside: See `check_output_is_free`.

    Raises:
        UpitError: `out` is not empty, is no folder, is in use, holds an unfinished run with
            another identity, or the disk is full.
    """
    check_output_is_free(out, overwrite=overwrite, outside=outside)
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpitError(
            f"The output folder {out} cannot be created ({error.strerror}); choose another."
        ) from None
    leave = False
    try:
        with exclusive(out):
            # Another run may have just finished.
            check_output_is_free(out, overwrite=overwrite, outside=outside)
            staging = _open_staging(out, identity)
            root = staging.root

            def on_exit() -> str:
                if staging.is_moving or has_progress(root):
                    return "Interrupted; the same command goes on from there."
                shutil.rmtree(root, ignore_errors=True)
                release(out)
                for folder in created:
                    remove_if_empty(folder)
                return "Interrupted; nothing was written."

            try:
                with ends_at_once(on_exit):
                    yield staging
                    move_into_place(staging, out)
                leave = True
            except BaseException as error:
                may_go_on = not isinstance(error, UpitError) or isinstance(error, ResumableError)
                leave = staging.is_moving or (may_go_on and has_progress(root))
                raise
            finally:
                if not leave:
                    shutil.rmtree(root, ignore_errors=True)
    finally:
        if not leave:
            for folder in created:
                remove_if_empty(folder)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes `folder` in one step; what was there is removed first.

    After an error nothing is left.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    for earlier in (folder, draft):  # which may be half of what a call that was killed wrote
        shutil.rmtree(earlier, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        sync_folder(draft)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(out: Path, rank: int = 0) -> Iterator[Path]:
    """Give a hidden folder on the disk of `out` for files that are needed for a while.

    It does not touch an unfinished run there.

    Args:
        rank: Of the process whose folder it is.
    """
    folder = out / STAGING / f"scratch-{rank}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove_scratch(out, rank)


def remove_scratch(out: Path, rank: int = 0) -> None:
    """Remove what `scratch_folder` gave, if it is there."""
    shutil.rmtree(out / STAGING / f"scratch-{rank}", ignore_errors=True)
    remove_if_empty(out / STAGING)


def _open_staging(out: Path, identity: Mapping[str, Any]) -> Staging:
    """Return the staging folder of an unfinished run with this identity, or a new one."""
    staging = Staging(out / STAGING)
    root, state, moving = staging.root, staging.state, staging.is_moving
    if state and (moving or has_progress(root)):
        if change := first_difference(state["identity"] or {}, identity):
            raise UpitError(
                f"The output folder {out} holds an unfinished run, but {change}; undo that to "
                f"finish it, or delete {root} to start over."
            )
        LOG.info("Going on with the unfinished run in %s.", out)
        for path in staging.model.iterdir():
            # Small files are made again; a draft of one must not become part of the output.
            if moving or path.suffix == ".safetensors":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return staging
    try:
        # Without a record of what is done, nothing there is of use; the lock says that nobody
        # else is using it.
        shutil.rmtree(root, ignore_errors=True)
        staging.begin(identity)
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise explained(error, out) from error
    return staging


def check_output_is_free(
    out: Path, *, overwrite: bool | None = False, outside: Path | None = None
) -> None:
    """Refuse an output folder that holds anything but, with `overwrite`, an earlier output.

    Args:
        overwrite: Replace an earlier output of this program (a folder with a report in it); None of
            what cannot be replaced by any command.
        outside: A mixture that is read: the output must not be within it.

    Raises:
        UpitError: naming what is there.
    """
    if out.is_file():
        raise UpitError(f"The output {out} is a file; give a folder.")
    if outside is not None and outside.resolve() in out.resolve().parents:
        raise UpitError(f"{out} is inside the mixture {outside}; choose a folder elsewhere.")
    if not out.is_dir():
        return
    if Staging(out / STAGING).is_moving:  # a complete output, in part here and in part still there
        return
    check_not_half_edited(out)
    ours = (STAGING, *EDIT_STAGING.values(), LOCK)
    present = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if not present:
        return
    if overwrite is None:
        raise UpitError(
            f"The output folder {out} is not empty (it holds {present[0]}); choose a new folder."
        )
    if not overwrite:
        raise UpitError(
            f"The output folder {out} is not empty (it holds {present[0]}); choose a new folder, "
            "or replace an earlier output with `upit-merge run --overwrite`."
        )
    if REPORT not in present:
        raise UpitError(
            f"The output folder {out} was not written by upit-merge (it has no {REPORT}); choose "
            "another folder."
        )


def check_not_half_edited(out: Path, but: str | None = None) -> None:
    """Refuse a model into which the files of another command were not all moved.

    Args:
        but: The command that asks, which finishes its own.

    Raises:
        UpitError: naming that command.
    """
    for command, folder in EDIT_STAGING.items():
        if command != but and Staging(out / folder).is_moving:
            raise UpitError(
                f"What `upit-merge {command}` makes is half-way into the model in {out}; give the "
                "command that was interrupted again first."
            )


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that has nothing in it."""
    try:
        folder.rmdir()
    except OSError:
        LOG.debug("left %s in place", folder)


def move_into_place(staging: Staging, out: Path) -> None:
    """Rename every file into `out`; does what is left of it if it was begun before."""
    if not staging.is_moving:
        new = output_files(staging.model)
        old = [name for name in _files_of(out / REPORT) if name not in new]
        staging.begin_moving(staging.state["identity"], old)
    names = output_files(staging.model)
    last = "config.json"
    if last in names:
        # An earlier output stops being a model before its files are mixed with the new ones.
        (out / last).unlink(missing_ok=True)
        if staging.root.name == STAGING:  # what was done to the earlier output
            for folder in EDIT_STAGING.values():
                shutil.rmtree(out / folder, ignore_errors=True)
    # The state of a folder from elsewhere must not make us remove anything anywhere else.
    obsolete = [*filter(is_output_name, staging.state["moving"]["obsolete"])]
    templates = out / TEMPLATE_FOLDER
    if templates.is_symlink() and any("/" in name for name in (*names, *obsolete)):
        templates.unlink()
    for name in obsolete:
        (out / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == last):
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(staging.model / name, out / name)
    if templates.is_dir():
        remove_if_empty(templates)
    _sync(out)
    # The state goes last: until then the same command finds that all is done.
    for path in staging.root.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _STATE:
            path.unlink()
    shutil.rmtree(staging.root, ignore_errors=True)


def output_files(folder: Path) -> list[str]:
    """Return the names of an output's files, those of its named chat templates with their folder."""
    inner = (folder / TEMPLATE_FOLDER).glob("*")
    names = [path.name for path in folder.iterdir() if path.name != TEMPLATE_FOLDER]
    return sorted([*names, *(f"{TEMPLATE_FOLDER}/{path.name}" for path in inner)])


def _sync(folder: Path) -> None:
    if (folder / TEMPLATE_FOLDER).is_dir():
        sync_folder(folder / TEMPLATE_FOLDER)
    sync_folder(folder)


def _files_of(report: Path) -> list[str]:
    """Return those of the files an earlier report says it came with that are there."""
    try:
        files = read_json(report, "the output").get("files")
    except UpitError:
        return []
    if not isinstance(files, list):
        return []
    return [name for name in filter(is_output_name, files) if (report.parent / name).is_file()]


def check_output_exists(out: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UpitError: naming it.
    """
    if not out.is_dir():
        what = "is a file" if out.is_file() else "does not exist"
        raise UpitError(f"The folder {out} {what}; give the folder that a upit recipe made.")
