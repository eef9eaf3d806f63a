"""Biases that only decide who is chosen: what one more expert has to say, by transformers' routers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter

from tests.support.gate_data import labelled_inputs
from upit_merge.models.formats import FORMATS
from upit_merge.router.objectives import LOGISTIC_PENALTY, added_row

EXPERTS = 5
SETTINGS = SimpleNamespace(
    num_experts_per_tok=1,
    hidden_size=EXPERTS,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    moe_num_experts=EXPERTS,
    moe_norm_min=1e-12,
    routed_scaling_factor=1.0,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    use_expert_bias=True,
)


def first_choice(router: Any, logits: Tensor, biases: Tensor) -> Tensor:
    """Who is chosen, (tokens,): the gate is the identity, so that what it sees is what it says."""
    router = router(SETTINGS)
    router.weight.data = torch.eye(EXPERTS)
    if isinstance(router, Lfm2MoeTopKRouter):
        return router(logits, biases)[2].flatten()
    owner = router.moe_statics if hasattr(router, "moe_statics") else router
    owner.e_score_correction_bias.data.copy_(biases.view_as(owner.e_score_correction_bias))
    return router(logits)[2].flatten()


ROUTERS = {
    "glm4_moe": Glm4MoeTopkRouter,
    "ernie4_5_moe": Ernie4_5_MoeTopKRouter,
    "lfm2_moe": Lfm2MoeTopKRouter,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_from_there_on_the_new_one_is_chosen(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    others = torch.randn(400, EXPERTS - 1, generator=generator)
    biases = torch.rand(EXPERTS, generator=generator) * 0.4
    needed = FORMATS[name].to_beat(others, biases[:-1] - biases[-1]).max(1).values

    def chosen(new: Tensor) -> Tensor:
        logits = torch.cat([others, new.unsqueeze(1)], dim=1)
        return first_choice(ROUTERS[name], logits, biases) == EXPERTS - 1

    scored = FORMATS[name].scores(torch.cat([others, needed.unsqueeze(1)], dim=1))
    assert chosen(needed + 1e-2)[scored[:, -1] < 0.999].all()
    assert not chosen(needed - 1e-2).any()
    # They are not what the others say: who takes that for it is wrong about some tokens.
    said = others.max(1).values
    assert not chosen(said + 1e-2).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_whom_no_logit_beats_and_whom_every_one_does(name: str) -> None:
    others = torch.tensor([[0.5, -0.5, 0.1, 0.0]])
    found = FORMATS[name].to_beat(others, torch.tensor([3.0, -3.0, 0.0, 0.0]))
    assert found.isfinite().all()
    assert found[0, 0] > 6
    assert found[0, 1] < -6
    torch.testing.assert_close(found[0, 2:], others[0, 2:])


@pytest.mark.parametrize("name", ROUTERS)
def test_an_added_row_is_at_the_minimum_beside_what_it_has_to_beat(name: str) -> None:
    data = replace(labelled_inputs(), layer=1)
    there = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1)) / 30
    leads = [torch.zeros(3), torch.tensor([0.1, -0.1, 0.05])]
    form = FORMATS[name]

    def to_beat(layer: int, logits: Tensor) -> Tensor:
        return form.to_beat(logits, leads[layer])

    gate = added_row(data, [*there], to_beat)
    assert torch.equal(gate[:3], there[1])
    assert not torch.equal(gate, added_row(data, [*there]))
    inputs, scale = data.inputs.double(), data.inputs.double().square().mean() ** -0.5
    said = inputs @ there[1].double().T
    if name == "ernie4_5_moe":
        powers = said.exp()
        needed = ((powers + leads[1] * powers.sum(1, keepdim=True)) / (1 - leads[1])).log()
    else:
        score = 1 / (1 + (-said).exp()) + leads[1]
        needed = (score / (1 - score)).log()
    own = (data.labels == 3).double()

    def loss(r: Tensor) -> Tensor:
        margin = inputs * scale @ r - needed.logsumexp(1)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(margin, own)
        return losses + LOGISTIC_PENALTY / 2 * r.square().sum()

    vector = (gate[3].double() / scale).requires_grad_()
    at_zero = torch.zeros_like(vector).requires_grad_()
    (start,) = torch.autograd.grad(loss(at_zero), at_zero)
    (end,) = torch.autograd.grad(loss(vector), vector)
    assert needed.isfinite().all()
    assert end.norm() < 3e-3 * start.norm()
