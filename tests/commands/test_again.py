"""Giving a command again that was carried out: it says so, computes nothing, and ends well."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.commands import invoke


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def recipe(family) -> Path:
    return family.write_recipe(family.recipe(router={"data": str(family.seed_file())}))


def test_a_finished_run_says_so_and_changes_nothing(family, recipe) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    before = state_of(out)
    again = invoke("run", recipe, out)
    assert again.exit_code == 0, again.output
    assert "nothing was computed" in again.output
    assert f"upit-merge evaluate {out}" in again.output
    assert state_of(out) == before


def test_how_much_is_computed_at_a_time_makes_no_other_run(family) -> None:
    seeds, out = str(family.seed_file()), family.root / "out"
    first = family.write_recipe(family.recipe(router={"data": seeds}))
    assert invoke("run", first, out).exit_code == 0
    second = family.write_recipe(family.recipe(router={"data": seeds, "batch_tokens": 64}))
    assert "nothing was computed" in invoke("run", second, out).output


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("seed", "differs in the recipe;"),
        ("seed data", "differs in the seed data and a file of a model or of the data"),
        ("checkpoint", "differs in a file of a model or of the data, or its time of change;"),
        ("no tokenizer", "differs in --copy-tokenizer;"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_told(
    family, recipe, change: str, differs: str
) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    words = []
    if change == "seed":
        words = ["--random-seed", "7"]
    elif change == "no tokenizer":
        words = ["--no-copy-tokenizer"]
    elif change == "seed data":
        with (family.root / "seed.jsonl").open("a") as file:
            file.write(json.dumps({"text": "one more"}) + "\n")
    else:
        weights = next(family.checkpoints[1].glob("*.safetensors"))
        os.utime(weights, ns=(1, 1))
    before = state_of(out)
    result = invoke("run", recipe, out, *words)
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert differs in result.stderr
    assert state_of(out) == before


def gates_of_zeros(out: Path) -> None:
    weights = next(out.glob("*.safetensors"))
    tensors = load_file(weights)
    gates = {name: t.zero_() for name, t in tensors.items() if name.endswith("gate.weight")}
    assert gates
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("between", [None, "page", "evaluate"])
def test_weights_written_by_anybody_else_are_noticed(family, recipe, between) -> None:
    """Also if a command of ours has written the report again, which says nothing of weights."""
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    gates_of_zeros(out)
    if between == "page":
        assert invoke("page", out).exit_code == 0
    elif between == "evaluate":
        data = family.root / "seed.jsonl"
        assert invoke("evaluate", out, "--data", data, "--card", "--quiet").exit_code == 0
    result = invoke("run", recipe, out)
    assert result.exit_code == 1
    assert "model.safetensors was written since" in result.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_other_files_that_were_written_since_are_noticed(family, recipe, name: str) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    time.sleep(0.02)
    (out / name).write_text("{}")
    result = invoke("run", recipe, out)
    assert result.exit_code == 1
    assert f"{name} was written since" in result.stderr


def test_another_card_block_is_told(family, recipe, caplog) -> None:
    out, seeds = family.root / "out", {"data": str(family.root / "seed.jsonl")}
    assert invoke("run", recipe, out).exit_code == 0
    other = family.write_recipe(family.recipe(router=seeds, card={"name": "Ada"}))
    assert "nothing was computed" in invoke("run", other, out).output
    assert "--recipe RECIPE` applies it" in caplog.text


def test_an_output_that_was_changed_since_is_not_this_run(family, recipe) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    seeds = family.root / "seed.jsonl"
    assert invoke("router", out, "--data", seeds, "--objective", "ridge").exit_code == 0
    result = invoke("run", recipe, out)
    assert result.exit_code == 1
    assert "changed since by `upit-merge router`" in result.stderr


def test_the_same_gates_are_not_fitted_twice(family, recipe) -> None:
    out, seeds = family.root / "out", family.root / "seed.jsonl"
    words = ["router", out, "--data", seeds, "--objective", "ridge"]
    assert invoke("run", recipe, out).exit_code == 0
    assert "are replaced" in invoke(*words).output
    before = state_of(out)
    again = invoke(*words)
    assert again.exit_code == 0
    assert "nothing was computed" in again.output
    assert state_of(out) == before
    # What the answer depends on makes it another call.
    assert "are replaced" in invoke(*words, "--seed", 3).output
    assert "are replaced" in invoke(*words).output
    weights = next(out.glob("*.safetensors"))
    os.utime(weights)  # somebody has written to it
    assert "are replaced" in invoke(*words).output


def test_the_same_experts_go_and_come_once(family, recipe) -> None:
    out, seeds = family.root / "out", family.root / "seed.jsonl"
    assert invoke("run", recipe, out).exit_code == 0
    extend = ["extend", out, "--model", family.base, "--data", seeds]
    shrink = ["shrink", out, "--experts", 3, "--data", seeds]
    for words in (extend, shrink):
        assert "nothing was computed" not in invoke(*words).output
        before = state_of(out)
        again = invoke(*words)
        assert again.exit_code == 0, again.output
        assert "nothing was computed" in again.output
        assert state_of(out) == before


@pytest.mark.parametrize("quiet", [False, True])
def test_a_verdict_appears_once(family, recipe, caplog, quiet: bool) -> None:
    result = invoke("run", recipe, family.root / "out", *["--quiet"] * quiet)
    told = result.output + caplog.text
    assert told.count("differ on these samples is within the noise") == 1


def test_a_file_that_is_gone_is_named(family, recipe) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    (out / "tokenizer.json").unlink()
    result = invoke("run", recipe, out)
    assert result.exit_code == 1
    assert "tokenizer.json is gone" in result.stderr
    assert invoke("run", recipe, out, "--overwrite").exit_code == 0
    assert (out / "tokenizer.json").is_file()


def test_the_report_tells_nothing_of_the_disk(family, recipe) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    digests = json.loads((out / "upit_report.json").read_text())["run"]
    assert {len(digest) for digest in digests.values()} == {64}


def test_a_report_by_anybody_else_is_no_finished_run(family, recipe) -> None:
    out = family.root / "out"
    assert invoke("run", recipe, out).exit_code == 0
    report = json.loads((out / "upit_report.json").read_text())
    (out / "upit_report.json").write_text(json.dumps({**report, "run": 7}))
    result = invoke("run", recipe, out)
    assert result.exit_code == 1
    assert "is not empty" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_results_are_not_written_over_the_data(family, recipe, command: str) -> None:
    out, data = family.root / "out", family.root / "seed.jsonl"
    assert invoke("run", recipe, out).exit_code == 0
    other = family.root / "mine.json"
    other.write_text("[1, 2]")
    before = data.read_bytes()
    for target, words in ((data, "written over the data"), (other, "is no file of results")):
        result = invoke(command, out, "--data", data, "--json", target)
        assert result.exit_code == 1
        assert words in result.stderr
    assert (data.read_bytes(), other.read_text()) == (before, "[1, 2]")
    results = family.root / "results.json"
    for _again in range(2):
        assert invoke(command, out, "--data", data, "--json", results, "--quiet").exit_code == 0
