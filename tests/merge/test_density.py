"""Density per tensor: scalars, gradients over the layers, filters, and densities per model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.recipes import document
from upit_merge.config.recipe import parse_recipe
from upit_merge.errors import UpitError
from upit_merge.merge.density import resolve_densities
from upit_merge.models.dense import DenseArchitecture
from upit_merge.models.formats import FORMATS, PLAIN

GATE_DOWN_UP = ("gate_proj", "down_proj", "up_proj")


def densities(layers: int, shared: Any, *per_model: Any) -> list[list[float]]:
    """Rows: layer by layer gate, down, up. Columns: models."""
    settings = per_model or (None,)
    models = [
        {"model": "m", "parameters": {} if own is None else {"density": own}} for own in settings
    ]
    recipe = parse_recipe(document(models=models, parameters={"density": shared}))
    architecture = DenseArchitecture(FORMATS["mixtral"], PLAIN | {"num_hidden_layers": layers}, {})
    assert [p for _, p, _ in architecture.ffn_names()] == [*GATE_DOWN_UP] * layers
    resolved = resolve_densities(
        architecture,
        recipe.parameters.density,
        [entry.parameters.density for entry in recipe.models],
    )
    assert resolved.dtype == torch.float64
    return resolved.tolist()


def column(*values: float) -> Any:
    """One model; values per row, or per layer if there is a third of them."""
    return [pytest.approx([value], abs=1e-12) for value in values]


def per_layer(*values: float) -> Any:
    return column(*(value for value in values for _ in GATE_DOWN_UP))


def test_density_scalar() -> None:
    assert densities(2, 0.7) == per_layer(0.7, 0.7)


@pytest.mark.parametrize(
    ("layers", "gradient", "expected"),
    [
        (3, [0.2, 0.6], (0.2, 0.4, 0.6)),
        (2, [0.2, 0.6], (0.2, 0.6)),
        (5, [0.2, 1.0, 0.4], (0.2, 0.6, 1.0, 0.7, 0.4)),
        (2, [0.5], (0.5, 0.5)),
        (1, [0.2, 0.6], (0.6,)),
    ],
)
def test_density_gradient_over_layers(
    layers: int, gradient: list[float], expected: tuple[float, ...]
) -> None:
    assert densities(layers, gradient) == per_layer(*expected)


def test_density_filter_by_projection() -> None:
    """The first filter that fits decides; without one that fits it is the default, 0.9."""
    down = {"filter": "down_proj", "value": 0.5}
    assert densities(2, [down, {"value": 0.8}]) == column(0.8, 0.5, 0.8, 0.8, 0.5, 0.8)
    assert densities(2, [{"value": 0.8}, down]) == column(*[0.8] * 6)
    assert densities(2, down) == column(0.9, 0.5, 0.9, 0.9, 0.5, 0.9)


def test_density_filter_with_a_gradient() -> None:
    setting = [{"filter": "up_proj", "value": [0.2, 0.6]}, {"value": 0.8}]
    assert densities(3, setting) == column(0.8, 0.8, 0.2, 0.8, 0.8, 0.4, 0.8, 0.8, 0.6)


def test_density_of_one_model() -> None:
    """An entry's own density wins where it applies; elsewhere the recipe's holds."""
    up = [{"filter": "up_proj", "value": 0.3}]
    layers = densities(2, 0.8, None, 0.5, [0.1, 0.2], up)
    plain, last = [0.8, 0.5, 0.1, 0.8], [0.8, 0.5, 0.2, 0.8]
    expected = [plain, plain, [*plain[:3], 0.3], last, last, [*last[:3], 0.3]]
    assert layers == [pytest.approx(row, abs=1e-12) for row in expected]


@pytest.mark.parametrize(
    "density",
    [
        {"filter": "down_prj", "value": 0.5},
        [{"filter": "self_attn", "value": 0.5}, {"value": 0.9}],
    ],
)
def test_a_filter_that_matches_nothing_is_refused(shared_family, merge, density) -> None:
    with pytest.raises(UpitError, match=r"density: the filter '\w+' matches no FFN tensor"):
        merge(shared_family.recipe(parameters={"density": density}))
