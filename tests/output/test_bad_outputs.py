"""Output folders that cannot be written or hold something else: nothing of others is touched."""

from __future__ import annotations

import errno
import shutil
from typing import Any

import pytest
from filelock import FileLock

from tests.conftest import Family
from tests.support.spoilt import (
    SECOND,
    UP,
    Case,
    assert_case_refused,
    assert_refused,
    both,
    each,
    entry,
    run,
    snapshot,
)

diverged = entry(SECOND, UP, float("nan"))


def empty_folder(family: Family) -> None:
    (family.root / "out").mkdir()


def thesis(family: Family) -> None:
    empty_folder(family)
    (family.root / "out" / "thesis.tex").write_text("ten years of work")


def earlier_output(family: Family) -> None:
    assert (
        run("upit-merge", family.write_recipe(family.recipe()), family.root / "out").exit_code == 0
    )


CASES = {
    "not empty": Case(
        thesis,
        "The output folder out is not empty (it holds thesis.tex); choose a new folder, or "
        "replace an earlier output with `upit-merge run --overwrite`.",
        out="out",
    ),
    "overwrite a foreign folder": Case(
        thesis,
        "The output folder out was not written by upit-merge (it has no upit_report.json); "
        "choose another folder.",
        ("--overwrite",),
        out="out",
    ),
    "a file": Case(
        lambda family: None,
        "The output recipe.yml is a file; give a folder.",
        out="recipe.yml",
    ),
    "below a file": Case(
        lambda family: None,
        "The output folder recipe.yml/out cannot be created (Not a directory); choose another.",
        out="recipe.yml/out",
    ),
    "an empty folder stays": Case(
        both(empty_folder, diverged),
        "… has NaN or infinite weights in …",
        out="out",
    ),
    "a failed overwrite keeps the earlier output": Case(
        both(earlier_output, diverged),
        "… has NaN or infinite weights in …",
        ("--overwrite",),
        out="out",
    ),
}


@each(CASES)
def test_one_sentence_and_nothing_touched(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


def test_overwrite(family: Family) -> None:
    """It replaces what an earlier run wrote, all of it and nothing else."""
    out, fresh = family.root / "out", family.root / "fresh"
    first = family.write_recipe(family.recipe(parameters={"num_experts": 4}))
    assert run("upit-merge", first, out, "--out-shard-size", "50K").exit_code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    (out / "notes.txt").write_text("mine")
    second = family.write_recipe(family.recipe(parameters={"num_experts": 2}))
    assert run("upit-merge", second, out, "--overwrite").exit_code == 0
    assert run("upit-merge", second, fresh).exit_code == 0
    assert snapshot(out).keys() - snapshot(fresh).keys() == {"notes.txt"}
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_two_runs_into_one_folder(family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    out.mkdir()
    with FileLock(out / ".upit-lock"):
        sentence = "Another run is writing to out; wait for it or choose another folder."
        assert_refused(run("upit-merge", recipe, out), sentence, family)
    assert run("upit-merge", recipe, out).exit_code == 0


def test_leftovers_of_a_killed_run_do_not_matter(family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    (out / ".upit-staging").mkdir(parents=True)
    (out / ".upit-staging" / "model.safetensors").write_bytes(b"half")
    (out / ".upit-lock").touch()
    assert run("upit-merge", recipe, out).exit_code == 0
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


# ---- trouble on the way --------------------------------------------------------------------


def test_full_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("upit_merge.io.tensor_file.PositionedFile.write", no_space)
    sentence = "The disk of out is full; free some space and run the same command again."
    assert_case_refused(Case(lambda family: None, sentence, out="out"), family, monkeypatch)


def test_too_small_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(family.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    sentence = (
        "The disk of out has 0.00 GB free, but the output (0.00 GB) must fit; free some space or "
        "choose another folder."
    )
    assert_case_refused(Case(lambda family: None, sentence, out="out"), family, monkeypatch)
