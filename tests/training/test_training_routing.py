"""Load balancing, what is logged of the routing, and which weights are trained."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY
from upit_merge.training.routing import (
    RoutingMonitor,
    balance_each_layer,
    load_balancing_loss,
    routing_metrics,
)
from upit_merge.training.trainable import freeze_others, routers

EXPERTS = 4


def mixture(kind: str = "mixtral") -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {**TINY, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        settings |= {"num_experts": EXPERTS, "moe_intermediate_size": 48, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for router in routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
    return model


def by_hand(logits: list[torch.Tensor], mask: torch.Tensor) -> float:
    """The formula, token by token."""
    total = 0.0
    for layer in logits:
        rows = [row.softmax(-1) for row, real in zip(layer, mask.flatten(), strict=True) if real]
        for expert in range(EXPERTS):
            f = sum(expert in row.topk(2).indices.tolist() for row in rows) / len(rows)
            p = sum(float(row[expert]) for row in rows) / len(rows)
            total += EXPERTS * f * p
    return total / len(logits)


def test_load_balancing_is_the_formula_in_every_layer() -> None:
    logits = [torch.randn(12, EXPERTS) for _ in range(3)]
    mask = torch.ones(2, 6)
    assert load_balancing_loss(logits, 2).item() == pytest.approx(by_hand(logits, mask))
    mask[0, 4:] = 0
    assert load_balancing_loss(logits, 2, mask).item() == pytest.approx(by_hand(logits, mask))


def test_load_balancing_of_nothing_but_padding_is_zero() -> None:
    logits = [torch.randn(6, EXPERTS, requires_grad=True) for _ in range(2)]
    loss = load_balancing_loss(logits, 2, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert all(layer.grad is not None and not layer.grad.any() for layer in logits)


def test_load_balancing_sees_what_layers_hide_from_each_other() -> None:
    first = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).repeat(8, 1)
    opposite = [first, first.flip(-1)]
    even = [torch.zeros(1, EXPERTS)]
    assert load_balancing_loss(even, 2).item() == pytest.approx(2)
    assert load_balancing_loss(opposite, 2).item() == pytest.approx(4, abs=0.01)


def test_a_mixture_gives_it_as_its_auxiliary_loss() -> None:
    model = mixture()
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    plain = model(ids, attention_mask=mask, output_router_logits=True)
    wanted = by_hand([layer.detach() for layer in plain.router_logits], mask)
    assert plain.aux_loss.item() != pytest.approx(wanted)
    balance_each_layer(model, routers(model), 2)
    for _ in range(2):
        outputs = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        assert outputs.aux_loss.item() == pytest.approx(wanted)
    outputs.aux_loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model))
    assert model(input_ids=ids).aux_loss is None


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_monitor_counts_real_tokens_only(kind: str) -> None:
    model = mixture(kind)
    found = routers(model)
    assert len(found) == TINY["num_hidden_layers"]
    monitor = RoutingMonitor(found)
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    monitor.mask = mask
    logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    sums = monitor.take()
    assert sums is not None
    real = mask.flatten().bool()
    for layer, row in zip(logits, sums, strict=True):
        p = layer[real].softmax(-1)
        counts = torch.bincount(p.topk(2).indices.flatten(), minlength=EXPERTS)
        assert row[:EXPERTS].tolist() == counts.tolist()
        assert row[-2].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
        assert row[-1].item() == 17
    assert monitor.take() is None


def test_metrics_of_even_and_of_lopsided_routing() -> None:
    even = torch.tensor([[10.0] * EXPERTS + [20 * math.log(EXPERTS), 20.0]])
    found = routing_metrics(even)
    assert found["routing_entropy"] == pytest.approx(1)
    assert found["load_entropy"] == pytest.approx(1)
    assert found["dead_experts"] == 0
    lopsided = torch.tensor([[20.0, 19.5, 0.5, 0.0, 0.0, 20.0]])
    found = routing_metrics(torch.cat([even, lopsided]))
    assert found["routing_entropy"] == pytest.approx(0.5)
    assert found["dead_experts"] == 2  # less than a fortieth of the places
    assert 0.5 < found["load_entropy"] < 1


def test_which_weights_are_trained() -> None:
    def trained(model: torch.nn.Module, what: str) -> set[str]:
        freeze_others(model, what)
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    model = mixture()
    everything = {name for name, _ in model.named_parameters()}
    assert trained(model, "all") == everything
    ffn = trained(mixture(), "ffn")
    assert ffn == {name for name in everything if ".mlp." in name}
    assert trained(mixture(), "router") == {name for name in ffn if name.endswith("gate.weight")}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    assert len(trained(dense, "ffn")) == 6
