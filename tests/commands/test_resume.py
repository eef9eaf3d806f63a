"""Killed, out of space, interrupted: what is left is no model, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.support.commands import done, invoke
from tests.support.crash import contents, crash
from tests.support.warm import Program
from upit_merge.output import journal as resume
from upit_merge.output.staging import STAGING

ROOT = Path(__file__).resolve().parents[2]


def assert_all_recovered(trials: list[dict[str, Any]]) -> None:
    for trial in trials:
        assert trial["wrong"] == []
        assert trial["complete"] or (trial["resumed"], trial["identical"]) == (0, True), trial


def test_killed_at_any_time(tmp_path: Path) -> None:
    trials = crash("killed_at_any_time", tmp_path)
    assert sum(trial["status"] == -signal.SIGKILL for trial in trials) == 50
    assert_all_recovered(trials)
    assert sum(trial["progress"] for trial in trials) >= 5  # else nothing was resumed


def test_killed_at_every_rename(tmp_path: Path) -> None:
    trials = crash("killed_at_every_rename", tmp_path)
    assert len(trials) > 10
    assert_all_recovered(trials)


def test_disk_fills_up(tmp_path: Path) -> None:
    trials = crash("disk_full", tmp_path)
    assert [trial["status"] for trial in trials] == [3] * 10
    assert_all_recovered(trials)


def can_mount() -> bool:
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    return not subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode


def test_disk_really_fills_up(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("no user namespaces here, in which a small disk could be mounted")
    trials = crash("disk_really_full", tmp_path, "unshare", "-rm")
    assert [trial["status"] for trial in trials] == [3] * 10
    assert_all_recovered(trials)


# ---- what was started must be what goes on -------------------------------------------------


@pytest.fixture
def unfinished(family: Family, monkeypatch: pytest.MonkeyPatch) -> tuple[Family, Path, Path]:
    """A run that ended before its last file, by what may happen to any program."""
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    recipe = family.write_recipe(family.recipe(parameters={"num_experts": 5, "density": 0.8}))
    out = family.root / "out"
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("upit_merge.commands.run.write_settings", fail)
        assert invoke("run", recipe, out).exit_code == 1
    assert os.listdir(out) == [STAGING]
    return family, recipe, out


def test_finished_tensors_are_not_made_again(unfinished, monkeypatch) -> None:
    _family, recipe, out = unfinished
    from upit_merge.io.checkpoint import Checkpoint

    read: set[str] = set()
    rows = Checkpoint.rows

    def note(self: Checkpoint, name: str, start: int, stop: int) -> Any:
        read.add(name)
        return rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", note)
    done("run", recipe, out)
    assert all(name.endswith("layernorm.weight") for name in read)  # of the training-free gates
    again = out.with_name("again") / out.name  # which the card has as its title
    done("run", recipe, again)
    report = json.loads((out / "upit_report.json").read_text())
    del report["seconds"]
    expected = json.loads((again / "upit_report.json").read_text())
    del expected["seconds"]
    assert report == expected
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_shard_that_was_harmed_is_made_again(unfinished, harm: str) -> None:
    """Its tensors are in the journal, but a journal says nothing of what others did since."""
    family, recipe, out = unfinished
    shard = out / STAGING / "model" / "model.safetensors"
    if harm == "removed":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    done("run", recipe, out)
    done("run", recipe, family.root / "again")
    again = family.root / "again" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == again.read_bytes()


def edit(text: str, new: str) -> Callable[[Family, Path], list[str]]:
    def change(family: Family, recipe: Path) -> list[str]:
        recipe.write_text(recipe.read_text().replace(text, new))
        return []

    return change


def touch(name: str) -> Callable[[Family, Path], list[str]]:
    def change(family: Family, recipe: Path) -> list[str]:
        path = family.root / name
        os.utime(path, ns=(0, 0))
        return []

    return change


def option(*options: str) -> Callable[[Family, Path], list[str]]:
    return lambda family, recipe: list(options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit("density: 0.8", "density: 0.7"), "parameters.density was 0.8 and is 0.7"),
        (edit("num_experts: 5", "num_experts: 6"), "parameters.num_experts was 5 and is 6"),
        (edit("parameters:", "dtype: float16\nparameters:"), "dtype was not set and is float16"),
        (edit("- model", "- parameters: {density: 0.5}\n  model"), "models has changed"),
        (option("--random-seed", "3"), "parameters.seed was 0 and is 3"),
        (option("--out-shard-size", "50000"), "--out-shard-size was 5000000000 and is 50000"),
        (touch("base/model.safetensors"), r"\S*base/model.safetensors changed since"),
        (touch("sft/checkpoint-500/config.json"), r"\S*checkpoint-500/config.json changed since"),
    ],
)
def test_another_run_does_not_go_on_with_it(unfinished, change, reason: str) -> None:
    family, recipe, out = unfinished
    options = change(family, recipe)
    before = sorted(path.name for path in (out / STAGING).rglob("*"))
    result = invoke("run", recipe, out, *options)
    assert result.exit_code == 1
    assert re.search(
        f"^Error: The output folder .*out holds an unfinished run, but {reason}; undo that to "
        r"finish it, or delete \S*.upit-staging to start over.$",
        result.stderr,
        re.MULTILINE,
    ), result.stderr
    assert sorted(path.name for path in (out / STAGING).rglob("*")) == before
    # The remedy works.
    shutil.rmtree(out / STAGING)
    done("run", recipe, out, *options)


def test_a_mistake_in_the_models_leaves_nothing(family: Family, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("upit_merge.merge.blocks._BLOCK_ELEMENTS", {"cpu": 1 << 10})
    from safetensors.torch import load_file, save_file

    path = family.checkpoints[-1] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    result = invoke("run", family.write_recipe(family.recipe()), family.root / "out")
    assert "has NaN or infinite weights in model.norm.weight" in result.stderr
    assert not (family.root / "out").exists()


def test_overwriting_is_resumed_too(family: Family, tmp_path: Path, monkeypatch) -> None:
    """The earlier output stays a model until the new one is complete, then goes with all files."""
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    done("run", recipe, out, "--out-shard-size", "60000")
    assert len(list(out.glob("*.safetensors"))) > 2
    with monkeypatch.context() as patch:
        replace, calls = os.replace, []

        def fail_in_the_middle(source: Any, target: Any) -> None:
            if Path(source).parent.name == "model":
                calls.append(target)
                if len(calls) == 3:
                    raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", fail_in_the_middle)
        assert invoke("run", recipe, out, "--overwrite").exit_code == 1
    assert not (out / "config.json").exists()
    done("run", recipe, out)
    fresh = tmp_path / "out"
    done("run", recipe, fresh)
    assert sorted(os.listdir(out)) == sorted(os.listdir(fresh))
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_training_the_router_leaves_an_unfinished_run_alone(family: Family, monkeypatch) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    done("run", recipe, out)
    with monkeypatch.context() as patch:
        patch.setattr("upit_merge.commands.run.write_settings", lambda *_, **__: 1 / 0)
        assert invoke("run", recipe, out, "--overwrite").exit_code == 1
    journal = out / STAGING / "journal-0.jsonl"
    before = journal.read_bytes()
    options = ("--data", family.seed_file(), "--objective", "ridge", "--quiet")
    done("router", out, *options)
    assert journal.read_bytes() == before
    assert sorted(os.listdir(out / STAGING)) == ["journal-0.jsonl", "model", "run.json"]


# ---- Ctrl-C --------------------------------------------------------------------------------

_BUSY = """
import ctypes, sys
from upit_merge.output import journal as resume
from upit_merge.merge import experts
resume.SAVE_SECONDS = {save}
mean_rows = experts._mean_rows
def busy(*args):
    sys.stderr.write("busy\\n"); sys.stderr.flush()
    ctypes.CDLL(None).sleep(60)  # does not look at Python's signals, as a matrix product does not
def slow_rows(models, name, *rows):
    if name == "lm_head.weight": busy()
    return mean_rows(models, name, *rows)
{patch}
sys.argv = {argv}
from {module} import main
main()
"""


@pytest.mark.parametrize(
    ("save", "patch", "line"),
    [
        (0.0, "experts._mean_rows = slow_rows", "the same command goes on from there"),
        (1e9, "experts._mean_rows = slow_rows", "nothing was written"),
        (0.0, "from upit_merge.commands import run; run.write_settings = lambda *a, **k: busy()",
         "the same command goes on from there"),
    ],
    ids=["in a thread", "at the start", "in the main thread"],
)  # fmt: skip
@pytest.mark.parametrize("module", ["upit_merge.cli.main", "mergekit.scripts.run_yaml"])
def test_ctrl_c(family: Family, save: float, patch: str, line: str, module: str) -> None:
    if module != "upit_merge.cli.main" and save:
        pytest.skip("the same code")
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    words = ["run"] if module == "upit_merge.cli.main" else []
    argv = ["program", *words, str(recipe), str(out), "--quiet"]
    script = _BUSY.format(save=save, patch=patch, argv=argv, module=module)
    with Program("-c", script, stderr=subprocess.PIPE, cwd=ROOT) as program:
        assert program.stderr is not None
        for told in program.stderr:
            if told == "busy\n":
                break
        time.sleep(0.3)
        pressed = time.monotonic()
        program.send_signal(signal.SIGINT)
        said = program.stderr.read()
        status = program.wait()
        took = time.monotonic() - pressed
    assert took < 2, said
    assert said.strip() == f"Interrupted; {line}."
    assert status == 130
    assert out.exists() == (save == 0)
    done("run", recipe, out, "--quiet")
    assert "model.safetensors" in contents(out)
