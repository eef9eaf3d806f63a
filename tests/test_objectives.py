"""Buckets and gate objectives against direct solutions: pure functions on small tensors."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from upit_merge.router.buckets import balanced, lowest
from upit_merge.router.objectives import (
    ONE_VS_REST_PENALTY,
    RIDGE_PENALTY,
    normalise,
    one_vs_rest,
    random_gate,
    ridge,
    token_weights,
)

CPU = torch.device("cpu")


def labelled_inputs(tokens: int = 600, width: int = 10, experts: int = 4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, experts, (tokens,), generator=generator)
    centres = torch.randn(experts, width, generator=generator)
    inputs = centres[labels] + torch.randn(tokens, width, generator=generator)
    return inputs, labels


def test_ridge_equals_a_direct_solve(monkeypatch) -> None:
    monkeypatch.setattr("upit_merge.router.objectives._CHUNK_ROWS", 100)
    inputs, labels = labelled_inputs()
    d = token_weights(labels, 4)[labels].double()
    h, y = inputs.double(), F.one_hot(labels, 4).double()
    covariance = h.T @ (d.unsqueeze(1) * h)
    covariance += RIDGE_PENALTY * covariance.diagonal().mean() * torch.eye(10)
    expected = torch.linalg.inv(covariance) @ h.T @ (d.unsqueeze(1) * y)
    gate = ridge(inputs, labels, 4, device=CPU)
    torch.testing.assert_close(gate, expected.T.float(), rtol=1e-4, atol=1e-5)


def test_one_vs_rest_is_at_the_minimum_of_its_loss(monkeypatch) -> None:
    """The gradient of the stated loss, by autograd in float64 on all tokens at once, vanishes."""
    monkeypatch.setattr("upit_merge.router.objectives._CHUNK_ROWS", 100)
    inputs, labels = labelled_inputs()
    gate = one_vs_rest(inputs, labels, 4, device=CPU).double()
    scale = inputs.double().square().mean() ** -0.5
    vectors = (gate / scale).requires_grad_()
    weights = token_weights(labels, 4)[labels].double()

    def loss(r: torch.Tensor) -> torch.Tensor:
        terms = F.binary_cross_entropy_with_logits(
            inputs.double() * scale @ r.T, F.one_hot(labels, 4).double(), reduction="none"
        )
        return (terms.sum(1) * weights).sum() + ONE_VS_REST_PENALTY / 2 * r.square().sum()

    at_zero = torch.zeros_like(vectors).requires_grad_()
    (start,) = torch.autograd.grad(loss(at_zero), at_zero)
    (end,) = torch.autograd.grad(loss(vectors), vectors)
    assert end.norm() < 1e-3 * start.norm()


@pytest.mark.parametrize("fit", [ridge, one_vs_rest])
def test_fitted_gates_tell_the_experts_apart(fit) -> None:
    inputs, labels = labelled_inputs()
    gate = normalise(fit(inputs, labels, 4, device=CPU), inputs, 1.0)
    accuracy = (F.linear(inputs, gate).argmax(1) == labels).float().mean()
    assert accuracy > 0.85


def test_normalise_sets_the_spread_of_the_logits() -> None:
    inputs, _labels = labelled_inputs()
    gate = torch.randn(4, 10) * 37
    for temperature in (0.5, 1.0, 2.0):
        logits = F.linear(inputs, normalise(gate, inputs, temperature))
        assert logits.std(dim=1, correction=0).mean() == pytest.approx(1 / temperature, rel=1e-4)


def test_random_gate_logits_have_unit_size() -> None:
    norm = torch.full((512,), 3.0)
    gate = random_gate(8, norm, torch.Generator().manual_seed(0))
    inputs = F.normalize(torch.randn(1000, 512), dim=1) * math.sqrt(512) * 3
    assert F.linear(inputs, gate).std() == pytest.approx(1, rel=0.05)


def test_token_weights_give_every_expert_the_same_say() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    weights = token_weights(labels, 3)
    assert weights.tolist() == pytest.approx([1 / 6, 0, 1 / 2])


def test_balanced_buckets_are_the_best_equal_ones() -> None:
    """Against all ways to split six samples into three pairs."""
    losses = torch.rand(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    best = min(
        losses[range(6), assignment].sum().item()
        for assignment in product(range(3), repeat=6)
        if all(assignment.count(e) == 2 for e in range(3))
    )
    assigned = balanced(losses)
    assert torch.bincount(assigned, minlength=3).tolist() == [2, 2, 2]
    assert losses.gather(1, assigned.unsqueeze(1)).sum().item() == pytest.approx(best)
    assert torch.bincount(balanced(losses[:4]), minlength=3).max() <= 2
    assert torch.equal(lowest(losses), losses.argmin(1))


@pytest.mark.parametrize(("samples", "experts"), [(40, 4), (60, 5), (200, 8), (30, 30), (7, 1)])
@pytest.mark.parametrize("digits", [2, 12])
def test_balanced_equals_an_assignment_problem(samples: int, experts: int, digits: int) -> None:
    """Against scipy's solver with one column per place; two digits make plenty of ties."""
    generator = torch.Generator().manual_seed(samples)
    losses = torch.rand(samples, experts, generator=generator, dtype=torch.float64)
    losses = (losses + 0.2 * torch.arange(experts)).round(decimals=digits)
    places = math.ceil(samples / experts)
    rows, columns = linear_sum_assignment(losses.numpy().repeat(places, axis=1))
    expected = losses.numpy().repeat(places, axis=1)[rows, columns].sum()
    assigned = balanced(losses)
    assert torch.bincount(assigned, minlength=experts).max() <= places
    assert losses.gather(1, assigned.unsqueeze(1)).sum().item() == pytest.approx(expected)
