"""Buckets and gate objectives against direct solutions: pure functions on small tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, minimize

from tests.support.gate_data import CPU, labelled_inputs, shares, together
from upit_merge.models.gates import random_gate
from upit_merge.router.buckets import balanced, lowest
from upit_merge.router.objectives import (
    LOGISTIC_PENALTY,
    RIDGE_PENALTY,
    GateData,
    added_row,
    covariance,
    hidden,
    normalise,
    one_vs_rest,
    ridge,
    softmax,
    upit,
    upit_gradient,
)


def paper(data: GateData) -> torch.Tensor:
    return upit(data, alpha=0.5, epochs=2, lr=1e-2, batch_size=4, seed=0)


def one_hot(data: GateData) -> torch.Tensor:
    return F.one_hot(data.labels, data.num_experts).double()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr("upit_merge.router.objectives.CHUNK_BYTES", 4 * 10 * 100)
    monkeypatch.setattr("upit_merge.router.objectives._PANEL_COLUMNS", 4)


def test_ridge_equals_a_direct_solve() -> None:
    data = labelled_inputs()
    h, y = data.inputs.double(), one_hot(data)
    moments = h.T @ h / len(h)
    torch.testing.assert_close(covariance(data), moments, rtol=1e-5, atol=1e-6)
    moments += RIDGE_PENALTY * moments.diagonal().mean() * torch.eye(10)
    expected = torch.linalg.inv(moments) @ h.T @ y / len(h)
    torch.testing.assert_close(ridge(data), expected.T.float(), rtol=1e-4, atol=1e-5)


def bce(logits: torch.Tensor, data: GateData) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, one_hot(data), reduction="none").sum(1)


def cross_entropy(logits: torch.Tensor, data: GateData) -> torch.Tensor:
    return F.cross_entropy(logits, data.labels, reduction="none")


@pytest.mark.parametrize(("fit", "terms"), [(one_vs_rest, bce), (softmax, cross_entropy)])
def test_logistic_fits_are_at_the_minimum_of_their_loss(fit, terms) -> None:
    """The gradient of the stated loss, by autograd in float64 on all tokens at once, vanishes."""
    data = labelled_inputs()
    scale = data.inputs.double().square().mean() ** -0.5
    vectors = (fit(data).double() / scale).requires_grad_()

    def loss(r: torch.Tensor) -> torch.Tensor:
        value = terms(data.inputs.double() * scale @ r.T, data).mean()
        return value + LOGISTIC_PENALTY / 2 * r.square().sum()

    at_zero = torch.zeros_like(vectors).requires_grad_()
    (start,) = torch.autograd.grad(loss(at_zero), at_zero)
    (end,) = torch.autograd.grad(loss(vectors), vectors)
    assert end.norm() < 3e-3 * start.norm()
    # No other way down: scipy's own solver from the same start ends no lower.
    found = minimize(
        lambda x: loss(torch.from_numpy(x).view(4, 10)).item(),
        np.zeros(40),
        jac=lambda x: (
            torch.autograd.functional.jacobian(loss, torch.from_numpy(x).view(4, 10))
            .numpy()
            .ravel()
        ),
        method="L-BFGS-B",
        options={"maxiter": 500},
    )
    assert loss(vectors).item() == pytest.approx(found.fun, abs=1e-5)


def test_hidden_is_the_mean_state() -> None:
    data = labelled_inputs()
    for expert, vector in enumerate(hidden(data)):
        mean = data.inputs[data.labels == expert].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_the_paper_s_gradient_is_autograd_s() -> None:
    """Against -log sigmoid(h · r) written out, on all tokens of a batch, by autograd."""
    data = labelled_inputs()
    rows = data.inputs[:50]
    vector = torch.randn(10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = 0.7 * -torch.sigmoid(rows.double() @ vector.double()).log().mean()
    (expected,) = torch.autograd.grad(loss, vector)
    found = upit_gradient(rows, vector, 0.3, 50)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_paper_s_vectors_are_those_of_a_plain_training_loop() -> None:
    """AdamW by autograd on one expert's samples, batch by batch in the same order."""
    data = labelled_inputs()
    gate = paper(data)
    for expert in range(data.num_experts):
        members = (data.assigned == expert).nonzero().flatten()
        generator = torch.Generator().manual_seed(expert)
        vector = torch.nn.Parameter(torch.zeros(10))
        optimizer = torch.optim.AdamW([vector], lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            order = members[torch.randperm(len(members), generator=generator)]
            for batch in order.split(4):
                rows = torch.cat([data.inputs[data.spans[i]] for i in batch.tolist()])
                optimizer.zero_grad()
                (0.5 * F.softplus(-(rows @ vector)).mean()).backward()
                optimizer.step()
        torch.testing.assert_close(gate[expert], vector.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fit", [ridge, one_vs_rest, softmax])
def test_fitted_gates_tell_the_experts_apart(fit) -> None:
    data = labelled_inputs()
    gate = normalise(fit(data), data, 1.0)
    accuracy = (F.linear(data.inputs, gate).argmax(1) == data.labels).float().mean()
    assert accuracy > 0.8


@pytest.mark.parametrize("fit", [ridge, one_vs_rest, softmax, hidden, paper])
def test_processes_that_share_the_samples_find_the_same_gate(fit) -> None:
    data = labelled_inputs()
    alone = normalise(fit(data), data, 1.0)
    found = together(lambda part: normalise(fit(part), part, 1.0), shares(data))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", [ridge, one_vs_rest, softmax, hidden, paper])
def test_an_expert_without_samples_does_not_disturb(fit) -> None:
    data = labelled_inputs()
    data = replace(data, assigned=data.assigned % 3)  # of four experts
    gate = fit(data)
    assert gate.isfinite().all()
    assert gate.shape == (4, 10)


def test_normalise_sets_the_spread_of_the_logits() -> None:
    data = labelled_inputs()
    gate = torch.randn(4, 10) * 37
    for temperature in (0.5, 1.0, 2.0):
        logits = F.linear(data.inputs, normalise(gate, data, temperature))
        assert logits.std(dim=1, correction=0).mean() == pytest.approx(1 / temperature, rel=1e-4)


def test_random_gate_logits_have_unit_size() -> None:
    norm = torch.full((512,), 3.0)
    gate = random_gate(8, norm, torch.Generator().manual_seed(0))
    inputs = F.normalize(torch.randn(1000, 512), dim=1) * math.sqrt(512) * 3
    assert F.linear(inputs, gate).std() == pytest.approx(1, rel=0.05)


def test_tokens_have_the_expert_of_their_sample() -> None:
    spans = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4)]
    data = GateData(torch.zeros(4, 2), spans, [1, 2, 5, 1], torch.tensor([0, 0, 1, 2]), 3, CPU)
    assert data.labels.tolist() == [0, 0, 0, 2]
    assert data.num_tokens == 9  # five are another process's


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
    assert torch.equal(balanced(losses), assigned)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_balanced_buckets_of_hardly_and_of_very_unlike_experts(scale: float) -> None:
    """Ties everywhere, differences near a solver's tolerances, and numbers far above them."""
    generator = torch.Generator().manual_seed(9)
    losses = 3 + scale * torch.rand(50, 4, generator=generator, dtype=torch.float64)
    rows, columns = linear_sum_assignment(losses.numpy().repeat(13, axis=1))
    expected = losses.numpy().repeat(13, axis=1)[rows, columns].sum()
    assigned = balanced(losses)
    assert torch.bincount(assigned, minlength=4).max() <= 13
    total = losses.gather(1, assigned.unsqueeze(1)).sum().item()
    assert total - expected == pytest.approx(0, abs=1e-9 * max(scale, 1e-3))


def test_an_added_row_is_at_the_minimum_beside_the_others() -> None:
    """Of the softmax's loss over the last vector alone; the others are given, and returned."""
    data = labelled_inputs()
    there = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1)) / 3
    data = replace(data, layer=1)
    gate = added_row(data, [*there])
    assert torch.equal(gate[:3], there[1])
    scale = data.inputs.double().square().mean() ** -0.5
    vector = (gate[3].double() / scale).requires_grad_()

    def loss(r: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([there[1].double() / scale, r.unsqueeze(0)])
        value = cross_entropy(data.inputs.double() * scale @ rows.T, data).mean()
        return value + LOGISTIC_PENALTY / 2 * r.square().sum()

    at_zero = torch.zeros_like(vector).requires_grad_()
    (start,) = torch.autograd.grad(loss(at_zero), at_zero)
    (end,) = torch.autograd.grad(loss(vector), vector)
    assert end.norm() < 3e-3 * start.norm()
