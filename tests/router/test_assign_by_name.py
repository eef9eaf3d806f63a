"""`--assign column:domain` where the labels are names: of the models, or as the user says."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import Family
from tests.support.commands import done, refused
from tests.support.naive import load_model
from upit_merge.config.router import RouterSettings

TEXTS = {"Code": "def f(x):", "math": "7 * 8 = 56", "wiki": "A city in"}


@pytest.fixture
def named(family: Family, merge):
    """A mixture of models that are called by what they know, in another order than the alphabet's."""
    for path, name in zip(family.checkpoints, ("wiki", "code", "math"), strict=True):
        path.rename(family.root / name)
    models = [str(family.root / name) for name in ("wiki", "code", "math")]
    return merge(family.recipe(models=models))


def data(family: Family, texts=TEXTS, name: str = "named.jsonl"):
    path = family.root / name
    rows = [{"text": f"{text} {i}", "domain": d} for i in range(4) for d, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gates(out) -> list[torch.Tensor]:
    return [t for n, t in sorted(load_model(out).items()) if n.endswith("moe.gate.weight")]


def test_names_of_models_are_labels(family: Family, named) -> None:
    """What numbers say by hand, names say too; it is told, recorded and fitted again the same."""
    path = data(family)
    done("router", named, "--data", path, "--assign", "column:domain:Code=1,math=2,wiki=0")
    by_hand = gates(named)
    done("router", named, "--data", path, "--objective", "random", "--quiet")
    printed = done("router", named, "--data", path, "--assign", "column:domain").output
    assert "Experts by the names of their models: Code is 1, math is 2, wiki is 0." in printed
    assert all(torch.equal(a, b) for a, b in zip(gates(named), by_hand, strict=True))
    settings = json.loads((named / "upit_report.json").read_text())["router"]["settings"]
    assert settings["assign"]["experts"] == {"Code": 1, "math": 2, "wiki": 0}
    assert "same bits" in done("verify", named, "--gates").output


def test_an_added_expert_has_its_model_s_name(family: Family, named) -> None:
    family.base.rename(family.root / "law")
    done("extend", named, "--model", family.root / "law", "--data", data(family), "--quiet")
    path = data(family, {**TEXTS, "law": "The court"}, "more.jsonl")
    printed = done("router", named, "--data", path, "--assign", "column:domain").output
    assert "wiki is 0, law is 3" in printed


def test_a_label_that_names_nothing_is_refused(family: Family, named) -> None:
    path = data(family, {**TEXTS, "poems": "Roses"})
    before = gates(named)
    message = refused("router", named, "--data", path, "--assign", "column:domain")
    assert (
        f"{path} line 4 has 'poems' in the column `domain`, which is no expert's number" in message
    )
    assert message.endswith("--assign column:domain:Code=0,math=1,wiki=2.")
    message = refused("router", named, "--data", path, "--assign", "column:domain:math=0")
    assert "not among router.assign.experts (math)" in message
    message = refused("router", named, "--data", path, "--assign", "column:domain:math=0,math=1")
    assert message == "--assign names math twice; give each label one expert."
    assert all(torch.equal(a, b) for a, b in zip(gates(named), before, strict=True))


@pytest.mark.parametrize(
    ("written", "column", "experts"),
    [
        ("column:kind", "kind", None),
        ("column:kind:a=0,b=1", "kind", {"a": 0, "b": 1}),
        ("column: kind : a b = 0 , c = 12", "kind", {"a b": 0, "c": 12}),
        ("column:meta:kind", "meta:kind", None),
        ("column:a=b", "a=b", None),
    ],
)
def test_what_may_be_written(written: str, column: str, experts) -> None:
    rule = RouterSettings.model_validate({"data": "d", "assign": written}).assign
    assert (rule.column, rule.experts) == (column, experts)
