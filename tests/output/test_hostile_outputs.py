"""Hostile input: outputs from elsewhere, whose hidden files and reports name files of the user's.

A command that changes a model finishes what an earlier call had begun there, and removes what an
earlier output came with; both are read from the folder itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from upit_merge.errors import UpitError
from upit_merge.io.text_file import replace_text
from upit_merge.output.edit import Edit
from upit_merge.output.lock import LOCK
from upit_merge.output.staging import REPORT, STAGING, staged_output
from upit_merge.report.write import RECIPE_COPY, recipe_of

STATE = "run.json"

ROOTS = (STAGING, ".upit-router")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user's, beside the one from elsewhere."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def interrupted(out: Path, root: str, obsolete: list[Any]) -> Path:
    """What a command leaves that was killed while it moved its files into place."""
    folder = out / root
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "new").write_text("new")
    state = {"identity": {}, "moving": {"obsolete": obsolete}}
    (folder / STATE).write_text(json.dumps(state))
    return folder


def go_on(out: Path, root: str) -> None:
    """Give the command again."""
    if root == STAGING:
        with staged_output(out, {}):
            pass
    else:
        with Edit(out, "router").begun():
            pass


@pytest.mark.parametrize("root", ROOTS)
def test_files_elsewhere_are_not_obsolete(root: str, out: Path, victim: Path) -> None:
    (out / "old").write_text("old")
    names = [str(victim / "file"), "../victim/file", "..", ".", "", "a\0b", 3, None, "old"]
    interrupted(out, root, names)
    go_on(out, root)
    assert (victim / "file").read_text() == "precious"
    assert [path.name for path in out.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "files",
    [["../victim/file", "..", "a\0b", "folder", "old"], 3, None, {"old": 1}, "old"],
    ids=str,
)
def test_files_elsewhere_are_not_of_an_earlier_output(files: Any, out: Path, victim: Path) -> None:
    (out / REPORT).write_text(json.dumps({"files": files}))
    (out / "old").write_text("old")
    (out / "folder").mkdir()
    with staged_output(out, {}, overwrite=True) as staging:
        (staging.model / "new").write_text("new")
    assert (victim / "file").read_text() == "precious"
    assert (out / "old").exists() == (not isinstance(files, list))
    assert (out / "new").exists()


def link(root: Path, name: str, target: Path) -> None:
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(target)


SPOILT: dict[str, Callable[[Path, Path, str], None]] = {
    "the lock": lambda out, victim, root: link(out, LOCK, victim / "file"),
    "the folder": lambda out, victim, root: link(out, root, victim),
    "its files": lambda out, victim, root: link(out / root, "model", victim),
    "a draft": lambda out, victim, root: link(out / root, f".{STATE}.draft", victim / "file"),
    "to nothing": lambda out, victim, root: link(out / root, "model", victim / "nothing"),
}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_links_in_hidden_folders(spoilt: str, root: str, out: Path, victim: Path) -> None:
    if spoilt != "the folder":
        interrupted(out, root, [])
    if spoilt in ("its files", "to nothing"):
        (out / root / "model" / "new").unlink()
        (out / root / "model").rmdir()
    SPOILT[spoilt](out, victim, root)
    with pytest.raises(UpitError, match=r"\.upit.* is a link, which upit-merge never makes there"):
        go_on(out, root)
    assert (victim / "file").read_text() == "precious"
    assert len(list(victim.iterdir())) == 1


def test_a_link_in_the_place_of_a_draft(out: Path, victim: Path) -> None:
    (out / ".file.draft").symlink_to(victim / "file")
    replace_text(out / "file", "new")
    assert (out / "file").read_text() == "new"
    assert (victim / "file").read_text() == "precious"


def test_a_link_to_a_recipe(out: Path, victim: Path) -> None:
    """What is there would be shown on the page."""
    (out / RECIPE_COPY).symlink_to(victim / "file")
    with pytest.raises(UpitError, match=f"{RECIPE_COPY} is a link to .*, outside its folder"):
        recipe_of(out)


def test_a_message_does_not_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    UpitError("a\x1b[2J\r\n\u202eb\udce4 is no model é; remove it.").show()
    assert capsys.readouterr().err == (
        "Error: a\\x1b[2J\\r\\n\\u202eb\\udce4 is no model é; remove it.\n"
    )
    assert issubclass(UpitError, click.ClickException)
