"""Hostile input: outputs from elsewhere, whose hidden files and reports name files of the user's.

A command that changes a model finishes what an earlier call had begun there, and removes what an
earlier output came with; both are read from the folder itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from upit_merge.errors import UpitError
from upit_merge.io.text_file import replace_text
from upit_merge.output.edit import Edit
from upit_merge.output.lock import LOCK
from upit_merge.output.staging import REPORT, STAGING, Staging, staged_output
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


# ---- the one folder inside an output: named chat templates -----------------------------------

TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize("root", ROOTS)
def test_templates_are_moved_and_removed(root: str, out: Path) -> None:
    (out / TEMPLATES).mkdir()
    (out / TEMPLATES / "old.jinja").write_text("old")
    folder = interrupted(
        out, root, [f"{TEMPLATES}/old.jinja", f"{TEMPLATES}/../../x", TEMPLATES + "/"]
    )
    (folder / "model" / TEMPLATES).mkdir()
    (folder / "model" / TEMPLATES / "new.jinja").write_text("new")
    go_on(out, root)
    assert sorted(path.name for path in out.rglob("*")) == [TEMPLATES, "new", "new.jinja"]


@pytest.mark.parametrize("root", ROOTS)
def test_a_link_in_the_place_of_the_templates(root: str, out: Path, victim: Path) -> None:
    (out / TEMPLATES).symlink_to(victim)
    folder = interrupted(out, root, [f"{TEMPLATES}/file"])
    (folder / "model" / TEMPLATES).mkdir()
    (folder / "model" / TEMPLATES / "file").write_text("new")
    go_on(out, root)
    assert (victim / "file").read_text() == "precious"
    assert (out / TEMPLATES / "file").read_text() == "new"


def test_templates_of_an_earlier_output_behind_a_link(out: Path, victim: Path) -> None:
    (out / TEMPLATES).symlink_to(victim)
    (out / REPORT).write_text(json.dumps({"files": [f"{TEMPLATES}/file", f"{TEMPLATES}/.."]}))
    with staged_output(out, {}, overwrite=True) as staging:
        (staging.model / "new").write_text("new")
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("call", range(1, 12))
def test_a_kill_while_templates_are_moved(
    call: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any step; the same command goes on, and nothing loads before all is there."""
    steps = ("replace", "unlink", "mkdir", "rmdir")
    left = [call]

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return step

    (out / TEMPLATES).mkdir()
    old = f"{TEMPLATES}/old.jinja"
    for name in ("config.json", old, REPORT):
        (out / name).write_text(json.dumps({"files": [old, "config.json"]}))
    staged = ("config.json", f"{TEMPLATES}/b.jinja", f"{TEMPLATES}/a.jinja")
    with monkeypatch.context() as patched:
        try:
            with staged_output(out, {}, overwrite=True) as staging:
                (staging.model / TEMPLATES).mkdir()
                for name in staged:
                    (staging.model / name).write_text("new")
                for step in steps:
                    patched.setattr(os, step, dying(getattr(os, step)))
        except KeyboardInterrupt:
            config = out / "config.json"
            if config.is_file() and config.read_text() == "new":
                assert all((out / name).is_file() for name in staged)
            elif config.is_file():
                assert (out / old).is_file()
        else:
            assert call > 5
    if Staging(out / STAGING).is_moving:
        go_on(out, STAGING)
        assert sorted(path.name for path in out.rglob("*.jinja")) == ["a.jinja", "b.jinja"]
        assert (out / "config.json").read_text() == "new"


def test_an_unfinished_run_s_templates_are_made_again(out: Path) -> None:
    folder = out / STAGING
    (folder / "model" / TEMPLATES).mkdir(parents=True)
    (folder / "model" / TEMPLATES / "half.jinja").write_text("half")
    (folder / STATE).write_text(json.dumps({"identity": {"a": 1}, "moving": None}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("upit_merge.output.staging.has_progress", lambda _: True)
        with staged_output(out, {"a": 1}) as staging:
            assert not list(staging.model.iterdir())
