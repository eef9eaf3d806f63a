"""The recipe: what its flexible keys come to, its defaults, and which folders a pattern names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.recipes import Document, document, parameters, router
from upit_merge.config.recipe import FilteredDensity, parse_recipe, parse_recipe_text


def upit(**settings: Any) -> Document:
    return router(objective="upit", upit=settings)


def test_defaults() -> None:
    recipe = parse_recipe(document())
    assert recipe.output_dtype is None
    assert recipe.router is None
    assert recipe.parameters.model_dump() == {
        "num_experts": None,
        "experts_per_token": None,
        "expansion": "genetic",
        "noise": 0,
        "reinitialise": 0,
        "density": 0.9,
        "select": "last",
        "parents": "most_dissimilar",
        "granularity": "model",
        "repeat_pairs": False,
        "similarity": "cosine",
        "mutation": "once",
        "backbone": "last",
        "shared": "auto",
        "shared_from": None,
        "dense_layers": 0,
        "seed": 0,
    }


def test_out_dtype_wins() -> None:
    assert parse_recipe(document(dtype="bfloat16")).output_dtype is torch.bfloat16
    both = document(dtype="bfloat16", out_dtype="float16")
    assert parse_recipe(both).output_dtype is torch.float16


def test_another_seed() -> None:
    recipe = parse_recipe(parameters(seed=3, num_experts=5))
    assert recipe.with_seed(None) is recipe
    assert recipe.with_seed(0).parameters == parse_recipe(parameters(num_experts=5)).parameters


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.9", 0.9),
        ("1", 1),
        ("9e-1", 0.9),
        ("1.0e+0", 1.0),
        ("[0.5, 1e-1]", [0.5, 0.1]),
        ("{value: 0.5}", FilteredDensity(value=0.5)),
        ("{filter: up_proj, value: [5e-1, 1]}", FilteredDensity(filter="up_proj", value=[0.5, 1])),
        (
            "[{filter: up_proj, value: 0.5}, {value: 0.9}]",
            [FilteredDensity(filter="up_proj", value=0.5), FilteredDensity(value=0.9)],
        ),
    ],
)
def test_density_as_written_in_yaml(written: str, read: Any) -> None:
    text = f"{{merge_method: upit, base_model: b, models: [model: m], parameters: {{density: {written}}}}}"
    assert parse_recipe_text(text).parameters.density == read


@pytest.mark.parametrize(
    ("written", "read"),
    [("500", 500), ("1", 1), ("1.0", 1.0), ("0.01", 0.01), ("1e-2", 0.01), ("null", None)],
)
def test_sample_is_a_count_or_a_fraction(written: str, read: float | None) -> None:
    """1 is one sample, 1.0 is all of them."""
    text = f"{{merge_method: upit, base_model: b, models: [model: m], router: {{data: d, sample: {written}}}}}"
    recipe = parse_recipe_text(text)
    assert recipe.router is not None
    assert recipe.router.sample == read
    assert type(recipe.router.sample) is type(read)


def test_a_column_may_assign_the_samples() -> None:
    for assign in ("column: kind", "column:kind", {"column": "kind"}):
        assert parse_recipe(router(assign=assign)).router.column == "kind"
    experts = {"code": 0, 7: 1}
    rule = parse_recipe(router(assign={"column": "kind", "experts": experts})).router.assign
    assert rule.experts == experts
    assert parse_recipe(router()).router.column is None


def test_the_paper_s_rates_and_stream_come_with_its_objective() -> None:
    rates = [
        parse_recipe(upit(**settings)).router.upit_settings.learning_rate
        for settings in ({}, {"train_experts": True}, {"train_experts": True, "lora_rank": 8})
    ]
    assert rates == [2e-4, 2e-5, 2e-4]
    assert parse_recipe(upit(lr="1e-3")).router.upit_settings.learning_rate == 1e-3
    assert parse_recipe(router(objective="upit")).router.router_stream == "expert"
    assert parse_recipe(router()).router.router_stream == "mean"
    assert parse_recipe(router(objective="upit", stream="mean")).router.router_stream == "mean"
