"""The assembled mixture layer by layer, and its gates' gradient, against whole transformers models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.seeds import some_samples
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.assembled import AssembledMixture
from upit_merge.engine.hidden_states import PackedStates, token_batches
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.refine import (
    GateTrainer,
    RefineState,
    Slopes,
    balance_loss,
    refine_gates,
    sample_order,
)

CPU = torch.device("cpu")
BALANCE = 0.3


@contextmanager
def mixture(out: Path, scratch: Path, **settings) -> Iterator[GateTrainer]:
    with opened_mixture(out) as moe:
        chosen = RouterSettings(data="-", refine={"steps": 6, "tokens": 60}, **settings)
        yield GateTrainer(LayerwiseMixture(moe, CPU), some_samples(), chosen, scratch)


def plain(out: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def sample_losses(model, sample: TokenizedSample) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Negative log-likelihood of the targets, and every layer's router logits; no padding."""
    ids = torch.tensor([sample.input_ids])
    output = model(ids, output_router_logits=True)
    logits = output.logits[0, sample.loss_start - 1 : -1]
    return F.cross_entropy(logits, ids[0, sample.loss_start :], reduction="sum"), list(
        output.router_logits
    )


@pytest.mark.parametrize("variant", ["llama", "tied", "sliding window", "qwen3"])
def test_mixture_is_the_whole_model_s(tmp_path, merge, variant: str) -> None:
    """Losses and routing, packed and batched, against one sample at a time in memory."""
    config = {
        "llama": {},
        "tied": {"tie_word_embeddings": True},
        "sliding window": {"kind": "mistral", "sliding_window": 5},
        "qwen3": {"kind": "qwen3"},
    }[variant]
    family = build_family(tmp_path / "family", **config)
    out = merge(family.recipe(parameters={"num_experts": 5}))
    samples = some_samples()
    lengths = [len(sample.input_ids) for sample in samples]
    model = plain(out)
    seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def look(layer: int, batch: Sequence[int], logits: torch.Tensor, chosen: torch.Tensor) -> None:
        sizes = [lengths[index] for index in batch]
        for index, *parts in zip(batch, logits.split(sizes), chosen.split(sizes), strict=True):
            seen[layer, index] = (parts[0], parts[1])

    with mixture(out, tmp_path) as trainer:
        states = PackedStates(lengths, 32, torch.float32, scratch=tmp_path, budget_bytes=1e9)
        batches = list(token_batches(range(len(samples)), lengths, 64))
        assert len(batches) > 1
        AssembledMixture(trainer.model).sweep(
            samples, batches, states, on_routing=look, on_progress=lambda _count: None
        )
        losses = trainer.model.losses(samples, states).sum(1)
    for index, sample in enumerate(samples):
        with torch.no_grad():
            expected, router_logits = sample_losses(model, sample)
        assert losses[index].item() == pytest.approx(expected.item(), abs=1e-4)
        for layer, logits in enumerate(router_logits):
            torch.testing.assert_close(seen[layer, index][0], logits, rtol=0, atol=1e-4)
            top = logits.topk(2).indices.sort(1).values
            assert torch.equal(seen[layer, index][1].sort(1).values, top)


@pytest.mark.parametrize("keep_bytes", [0, 1e9])
@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 30, "memory_gb": 1e-9}], ids=str)
def test_slopes_are_autograd_s(shared_family, merge, tmp_path, keep_bytes, settings) -> None:
    """Of loss and load balancing over all samples at once, with the whole model in memory."""
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    gates = [torch.randn(5, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    chosen = [0, 2, 3, 7]
    with mixture(out, tmp_path, **settings) as trainer:
        moe = AssembledMixture(trainer.model, gates, keep_bytes=keep_bytes)
        found = trainer.slopes(moe, chosen, BALANCE)
        again = trainer.slopes(moe, chosen, BALANCE)
    assert torch.equal(found.gates, again.gates)
    assert not list(tmp_path.glob("hidden-*"))

    model = plain(out)
    weights = [layer.mlp.gate.weight for layer in model.model.layers]
    for weight, gate in zip(weights, gates, strict=True):
        weight.data.copy_(gate)
    samples = [some_samples()[index] for index in chosen]
    results = [sample_losses(model, sample) for sample in samples]
    loss = sum(nll for nll, _ in results) / sum(sample.num_targets for sample in samples)
    balance = torch.zeros(())
    for layer in range(2):
        logits = torch.cat([router_logits[layer] for _, router_logits in results])
        shares = F.one_hot(logits.topk(2).indices, 5).sum(1).float().mean(0)
        balance = balance + 5 * (shares * logits.softmax(1).mean(0)).sum() / 2
    expected = torch.autograd.grad(loss + BALANCE * balance, weights)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.balance == pytest.approx(balance.item(), rel=1e-5)
    torch.testing.assert_close(found.gates, torch.stack(expected), rtol=1e-3, atol=1e-6)
    assert found.gates.abs().max() > 1e-3


def test_even_routing_has_the_least_balance_loss() -> None:
    even = torch.full((10, 4), 0.25)
    assert balance_loss(even, torch.full((4,), 0.5), 10).item() == pytest.approx(2.0)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(10, 4)
    assert balance_loss(skewed, torch.tensor([1.0, 0.4, 0.3, 0.3]), 10) > 2.0


def test_refinement_lowers_the_loss_and_goes_on_where_it_stopped(
    shared_family, merge, tmp_path
) -> None:
    out = merge(shared_family.recipe())
    start = [torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    reached: list[RefineState] = []

    def run(done: RefineState | None = None) -> RefineState:
        with mixture(out, tmp_path) as trainer:
            return refine_gates(
                trainer, start, seed=0, keep_bytes=0, done=done, after_step=reached.append
            )

    def loss(gates: Sequence[torch.Tensor]) -> Slopes:
        with mixture(out, tmp_path) as trainer:
            return trainer.slopes(AssembledMixture(trainer.model, gates), range(9), 0.0)

    whole = run()
    assert len(reached) == 6
    assert whole.history.shape == (6, 2)
    assert loss(whole.gates).loss < loss(start).loss - 1e-4
    for gate, before in zip(whole.gates, start, strict=True):
        # The rate is in units of the gate's own size: 6 steps of at most 0.02, falling.
        assert 0 < (gate - before).abs().max() < 0.1 * before.square().mean().sqrt()
    midway = {name: tensor.clone() for name, tensor in reached[2].to_tensors().items()}
    again = run(RefineState(**midway))
    for name, tensor in whole.to_tensors().items():
        assert torch.equal(again.to_tensors()[name], tensor), name


def test_every_sample_has_its_turn_in_every_epoch() -> None:
    lengths = [5, 9, 3, 30, 7, 4, 8, 2]
    steps = sample_order(lengths, 16, 40, seed=0)
    assert len(steps) == 40
    for chosen in steps:
        assert len(chosen) == 1 or sum(lengths[index] for index in chosen) <= 16
    flat = [index for chosen in steps for index in chosen]
    epochs = [flat[start : start + 8] for start in range(0, len(flat) - 7, 8)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
