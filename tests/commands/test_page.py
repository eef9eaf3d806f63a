"""`upit-merge page`: what a recipe's `card:` block says, and what the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.cards import card_of, report_of
from tests.support.commands import done, invoke, refused
from upit_merge.errors import printable

CARD = {"name": "Ada", "license": "mit", "language": "en", "tags": ["law"]}


@pytest.fixture
def out(family: Family) -> Path:
    folder = family.root / "out"
    done("run", family.write_recipe(family.recipe(card=CARD)), folder, "--quiet")
    return folder


def head(out: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(card_of(out).split("---")[1]))


def test_a_recipe_names_the_model(out: Path, family: Family) -> None:
    assert "\n# Ada\n" in card_of(out)
    assert (head(out)["license"], head(out)["language"]) == ("mit", ["en"])
    assert "law" in head(out)["tags"]


def test_another_card_block_is_no_other_run(out: Path, family: Family) -> None:
    recipe = family.write_recipe(family.recipe(card={"name": "Grace"}))
    assert "nothing was computed" in done("run", recipe, out).output
    done("page", out, "--recipe", recipe)
    assert "\n# Grace\n" in card_of(out)
    assert "license" not in head(out)
    done("page", out, "--recipe", family.write_recipe(family.recipe()))
    assert "\n# out\n" in card_of(out)


def test_what_it_writes_is_what_transformers_generates(out: Path) -> None:
    done("page", out, "--sample", "abc", "--sample", "12")
    samples = report_of(out)["samples"]
    assert [sample["prompt"] for sample in samples] == ["abc", "12"]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model.generate(ids, max_length=64, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(said, skip_special_tokens=True)
    assert samples[0]["text"] == f"{printable(expected)} …"
    assert "## What it writes" in card_of(out)
    assert done("verify", out).exit_code == 0


def test_other_gates_forget_what_was_written(out: Path, family: Family) -> None:
    done("page", out, "--sample", "abc")
    done("router", out, "--data", family.seed_file(), "--objective", "ridge", "--quiet")
    assert "samples" not in report_of(out)
    assert "## What it writes" not in card_of(out)


def test_mistakes_are_one_sentence_and_change_nothing(out: Path, tmp_path: Path) -> None:
    before = card_of(out)
    assert "does not exist" in refused("page", tmp_path / "nowhere")
    assert "does not exist" in refused("page", out, "--recipe", tmp_path / "no.yml")
    bad = tmp_path / "bad.yml"
    bad.write_text(
        "merge_method: upit\nbase_model: x\nmodels: [{model: y}]\ncard: {licence: mit}\n"
    )
    assert "licence" in refused("page", out, "--recipe", bad)
    long = "x" * 100
    assert "shorten it" in refused("page", out, "--sample", long)
    (out / "README.md").write_text("mine")
    assert "--force" in refused("page", out, "--sample", "abc")
    assert card_of(out) == "mine"
    assert invoke("page", out, "--force").exit_code == 0
    assert card_of(out) == before
