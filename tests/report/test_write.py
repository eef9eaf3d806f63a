"""Card and report when the model changes, and when its owner has changed the card."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import Family
from tests.support.cards import REPORT, assert_valid_for_the_hub, card_of, render, report_of
from tests.support.commands import done, refused
from tests.support.commands import invoke as command
from tests.support.loading import load


def held_out(root: Path) -> Path:
    path = root / "held-out.jsonl"
    rows = [{"text": f"{letter}bcde" * 4, "kind": "letters"} for letter in "aefg"]
    rows += [{"text": f"{i}2345" * 4, "kind": "digits"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_evaluation_is_kept_until_the_model_changes(four: Family, moe: Path, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in moe.glob("model*")}
    data = held_out(tmp_path)
    evaluate = ("evaluate", moe, "--data", data, "--group-by", "kind", "--quiet")
    done(*evaluate, "--json", tmp_path / "e.json")
    assert "evaluation" not in report_of(moe)
    done(*evaluate, "--card")
    kept, whole = report_of(moe)["evaluation"], json.loads((tmp_path / "e.json").read_text())
    for name in ("letters", "digits", "all"):
        assert kept["groups"][name]["perplexity"] == whole["groups"][name]["perplexity"]
        layers = torch.tensor(whole["groups"][name]["routing"])
        assert kept["groups"][name]["routing"] == pytest.approx(layers.mean(0).tolist())
    assert kept["by_layer"] == whole["groups"]["all"]["routing"]
    text = card_of(moe)
    assert re.search(rf"\| this mixture \|.*{kept['groups']['all']['perplexity']:.2f}", text)
    assert "upit_routing.png" in text
    assert "of held-out.jsonl" in text
    assert str(tmp_path) not in json.dumps(kept)
    assert {path.name: path.read_bytes() for path in moe.glob("model*")} == before
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())
    assert_valid_for_the_hub(moe / "README.md")
    done("verify", moe)

    # What another command measured on the same text stays, else it goes.
    report = report_of(moe)
    report["evaluation"]["others"] = [{"model": "the base", "perplexity": 9.0}]
    (moe / REPORT).write_text(json.dumps(report))
    done(*evaluate, "--card", "--no-experts")
    assert "| the base |   |   | **9.00** |" in card_of(moe)
    assert "alone, the best of them" not in card_of(moe)
    done("evaluate", moe, "--data", four.seed_file(), "--card", "--quiet")
    assert "others" not in report_of(moe)["evaluation"]

    done("router", moe, "--data", four.seed_file(), "--quiet")
    assert "evaluation" not in report_of(moe)
    assert "## Evaluation" not in card_of(moe)
    assert not (moe / "upit_routing.png").exists()
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())


def test_one_kind_of_text_is_all(moe: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "abc abc", "kind": "only"}\n' * 3)
    done("evaluate", moe, "--data", data, "--group-by", "kind", "--card", "--quiet")
    assert "| model | only |" in card_of(moe)


def test_a_card_that_was_edited_is_left_alone(four: Family, moe: Path, caplog) -> None:
    own = card_of(moe) + "\nMy own words.\n"
    (moe / "README.md").write_text(own)
    pictures = {path: path.read_bytes() for path in moe.glob("*.png")}
    done("router", moe, "--data", four.seed_file(), "--objective", "ridge", "--quiet")
    done("shrink", moe, "--experts", "3", "--data", four.seed_file(), "--quiet")
    assert card_of(moe) == own
    assert {path: path.read_bytes() for path in moe.glob("*.png")} == pictures
    assert caplog.text.count("was edited since it was written, so it is left as it is.") == 2
    assert report_of(moe)["model"]["num_experts"] == 3
    assert "was edited since it was written; add --force to replace it." in refused("page", moe)
    done("page", moe, "--force")
    assert "A mixture of 3 experts" in card_of(moe)
    text = card_of(moe)
    done("page", moe)
    assert card_of(moe) == text


def test_a_card_that_was_removed_is_not_missed(four: Family, moe: Path, caplog) -> None:
    (moe / "README.md").unlink()
    done("router", moe, "--data", four.seed_file(), "--quiet")
    assert not (moe / "README.md").exists()
    assert "README" not in caplog.text
    done("page", moe)
    assert "pre-trained layer by layer" in card_of(moe)
    assert_valid_for_the_hub(moe / "README.md")


def test_models_of_older_versions_work_as_they_did(
    four: Family, moe: Path, tmp_path, caplog
) -> None:
    """Their reports lack what the card needs: the card stays, all else is done."""
    report = report_of(moe)
    for key in ("model", "sources", "page", "seed_option"):
        del report[key]
    (moe / REPORT).write_text(json.dumps(report))
    (moe / "README.md").write_text("# An older page\n")
    data = ("--data", four.seed_file(), "--quiet")
    done("router", moe, *data)
    done("extend", moe, "--model", four.checkpoints[3], *data)
    done("verify", moe)
    done("shrink", moe, "--experts", "4", *data)
    done("evaluate", moe, "--data", held_out(tmp_path), "--card", "--quiet")
    assert card_of(moe) == "# An older page\n"
    assert "not written by this version of upit-merge, so it is left as it is" in caplog.text
    after = report_of(moe)
    assert "model" not in after
    assert after["evaluation"]["groups"]["all"]["samples"] == 8
    assert "has not all that a model card says" in refused("page", moe)


def test_a_report_from_elsewhere_removes_no_other_files(four: Family, moe: Path) -> None:
    """What it calls pictures may be anything on this machine."""
    victim = moe.parent / "victim.png"
    victim.touch()
    report = report_of(moe)
    report["page"]["pictures"] += ["../victim.png", "config.json", str(victim)]
    (moe / REPORT).write_text(json.dumps(report))
    done("router", moe, "--data", four.seed_file(), "--quiet")
    assert victim.exists()
    assert (moe / "config.json").exists()
    for broken in ({"page": 1}, {"history": 5}, {"evaluation": []}):
        (moe / REPORT).write_text(json.dumps(report | broken))
        told = refused("router", moe, "--data", four.seed_file(), "--quiet")
        assert f"is not the report of a upit run ({next(iter(broken))}:" in told


def test_without_a_report_there_is_nothing_to_keep_results_in(moe: Path, tmp_path: Path) -> None:
    (moe / REPORT).unlink()
    told = refused("evaluate", moe, "--data", held_out(tmp_path), "--card")
    assert "has no upit_report.json to keep the results in; leave out --card" in told


def test_an_interrupted_edit_is_finished_first(moe: Path, tmp_path: Path, monkeypatch) -> None:
    """The card is half-way into place: other commands wait for the one that put it there."""
    original = os.replace

    def fail_on_the_report(source: Any, target: Any) -> None:
        if Path(target) == moe / REPORT:
            raise KeyboardInterrupt
        original(source, target)

    evaluate = ("evaluate", moe, "--data", held_out(tmp_path), "--card", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_the_report)
        assert command(*evaluate).exit_code == 1
    assert "What `upit-merge evaluate` makes is half-way" in refused("page", moe)
    done(*evaluate)
    assert_valid_for_the_hub(moe / "README.md")
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())


def test_a_picture_that_cannot_be_drawn_is_left_out(
    shared_family, merge, monkeypatch, caplog
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("matplotlib.figure.Figure.subplots", broken)
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    assert load(out).config.num_local_experts == 5
    assert "upit_experts.png is left out of the model card (no fonts)." in caplog.text
    assert "upit_experts.png" not in card_of(out)
    assert not (out / "upit_experts.png").exists()
    assert_valid_for_the_hub(out / "README.md")


def test_overwriting_leaves_no_picture_behind(shared_family, merge) -> None:
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    assert (out / "upit_experts.png").is_file()
    merge(shared_family.recipe(), overwrite=True)
    assert not (out / "upit_experts.png").exists()
    assert report_of(out)["files"] == sorted(path.name for path in out.iterdir())


def test_the_card_depends_on_report_and_recipe_alone(moe: Path, tmp_path: Path) -> None:
    recipe = (moe / "mergekit_config.yml").read_text()
    assert render(report_of(moe), recipe) == card_of(moe)
    elsewhere = shutil.copytree(moe, tmp_path / "renamed")
    done("page", elsewhere)
    assert card_of(elsewhere) == card_of(moe)
    assert yaml.safe_load(recipe)["merge_method"] == "upit"
