"""Losses to first order: against autograd and brute force on plain models; groups; the fall-back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.naive import load_model
from tests.support.seeds import some_samples
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine import first_order as engine
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router import memory
from upit_merge.router.assignment import assigned, sample_losses
from upit_merge.router.control import (
    Control,
    PairLosses,
    control_pairs,
    control_size,
    loss_sweeps,
)
from upit_merge.router.first_order import first_order
from upit_merge.router.stage import RouterStage

CPU = torch.device("cpu")


@contextmanager
def opened_stage(moe: Path, scratch: Path, samples=None, **settings) -> Iterator[RouterStage]:
    with opened_mixture(moe) as source:
        model = LayerwiseMixture(source, CPU)
        seeds = SeedSet(samples or some_samples(), 64)
        chosen = RouterSettings(data="-", **settings)
        yield RouterStage(model, seeds, chosen, 0, scratch, quiet=True)


def dense_ffns(folders: list[Path]) -> list[dict[str, Tensor]]:
    """Every expert's FFN by dense names, float32."""
    return [{n: t.float() for n, t in load_model(f).items() if ".mlp." in n} for f in folders]


def by_autograd(backbone: Path, ffns: list[dict[str, Tensor]], samples) -> tuple[Tensor, Tensor]:
    """Summed losses of the mean model and ⟨gradient, difference⟩, one sample at a time."""
    dense = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    mean = {name: sum(ffn[name] for ffn in ffns) / len(ffns) for name in ffns[0]}
    dense.load_state_dict(mean, strict=False)
    weights = {name: p for name, p in dense.named_parameters() if name in mean}
    losses, products = [], []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        labels = ids.clone()
        labels[0, : sample.loss_start] = -100
        dense.zero_grad()
        loss = dense(ids, labels=labels).loss * sample.num_targets
        loss.backward()
        losses.append(loss.item())
        products.append(
            [
                sum(float((p.grad * (ffn[n] - mean[n])).sum()) for n, p in weights.items())
                for ffn in ffns
            ]
        )
    return torch.tensor(losses), torch.tensor(products)


@pytest.mark.parametrize("variant", ["llama", "tied", "sliding window", "qwen3", "bfloat16"])
def test_products_are_those_of_autograd(tmp_path, merge, variant: str) -> None:
    """Layer by layer, in batches, block by block."""
    config = {
        "llama": {},
        "tied": {"tie_word_embeddings": True},
        "sliding window": {"kind": "mistral", "sliding_window": 5},
        "qwen3": {"kind": "qwen3"},
        "bfloat16": {"dtype": torch.bfloat16},
    }[variant]
    family = build_family(tmp_path, count=3, **config)
    out = merge(family.recipe())
    with opened_stage(out, tmp_path, batch_tokens=64) as stage:
        found = first_order(stage)
    losses, products = by_autograd(
        family.checkpoints[-1], dense_ffns(family.checkpoints), some_samples()
    )
    torch.testing.assert_close(found.mean.float(), losses, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.products.float(), products, rtol=1e-4, atol=1e-4)
    assert products.abs().max() > 0.01
    # Differences of the experts from their mean: what one gains, others lose.
    assert found.products.sum(1).abs().max() < 1e-4


def test_groups_and_blocks_do_not_matter(shared_family, merge, tmp_path, monkeypatch) -> None:
    out = merge(shared_family.recipe())
    with opened_stage(out, tmp_path, batch_tokens=64) as stage:
        whole = first_order(stage)
    monkeypatch.setattr(memory, "GROUP_BYTES", 1)
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", 100)
    with opened_stage(out, tmp_path, batch_tokens=64, memory_gb=1e-6) as stage:
        parted = first_order(stage)
    assert torch.equal(parted.mean, whole.mean)
    torch.testing.assert_close(parted.products, whole.products, rtol=1e-5, atol=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("mean-", "entering-"))]


def test_what_the_gates_see_is_kept_on_the_way(shared_family, merge, tmp_path) -> None:
    """The gates are those of a sweep of their own, to the last bit."""
    out = merge(shared_family.recipe())
    settings = {"batch_tokens": 64, "losses": "first_order"}
    with opened_stage(out, tmp_path, **settings) as stage:
        buckets = assigned(stage)
        assert stage.kept_inputs[0].complete
        kept = stage.gates(buckets)
        assert not list(tmp_path.glob("gate-inputs-*"))
    with opened_stage(out, tmp_path, **settings) as stage:
        swept = stage.gates(buckets)
    assert all(torch.equal(one, other) for one, other in zip(kept, swept, strict=True))


@pytest.mark.parametrize(
    ("experts", "samples", "sweeps"),
    [(4, 1000, 4), (8, 1000, 4.2 + 32 * 8 / 1000), (8, 20, 8), (64, 60, 4.2 + 16 * 8 / 60)],
)
def test_few_experts_or_samples_are_cheaper_exactly(experts, samples, sweeps) -> None:
    assert loss_sweeps(RouterSettings(data="-"), experts, samples) == pytest.approx(sweeps)
    assert loss_sweeps(RouterSettings(data="-", losses="exact"), experts, samples) == experts


def made_up(samples: int = 200, experts: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 0.1 * torch.randn(samples, experts, generator=generator, dtype=torch.float64)


def control_of(estimated: Tensor, exact: Tensor) -> Control:
    pairs = control_pairs(estimated, 0)
    rows, columns = torch.tensor(pairs).T
    halves = exact[rows, columns].unsqueeze(1).expand(-1, 2) * 10
    return Control.of(
        estimated, PairLosses(pairs, halves, torch.full(halves.shape, 10.0, dtype=torch.float64))
    )


@pytest.mark.parametrize("experts", [6, 20])
def test_the_control_group_knows_good_from_bad(experts: int) -> None:
    exact = made_up(experts=experts)
    good = control_of(exact + 0.3 + 0.002 * made_up(experts=experts, seed=1), exact)
    assert good.trusted == 1
    assert good.agreement > 0.8
    bad = control_of(made_up(experts=experts, seed=2), exact)
    assert bad.trusted > 4
    assert bad.given_up[0] > 0.5 * bad.gain


def test_where_the_second_guess_is_right_two_are_tried() -> None:
    exact = made_up()
    order = exact.argsort(1)
    # The two best have each other's losses.
    swapped = exact.scatter(1, order[:, :2], exact.gather(1, order[:, :2].flip(1)))
    control = control_of(swapped, exact)
    assert control.trusted == 2
    assert control.agreement == 0
    assert control.given_up[1] == 0
    assert f"{control.given_up[0]:.4f} of {control.gain:.4f} nats" in control.complaint()


def test_offsets_are_what_is_missing_to_the_exact_losses() -> None:
    exact = made_up()
    offsets = torch.arange(6.0, dtype=torch.float64)
    found = control_of(exact - offsets, exact).offsets
    # Drawn towards their mean, 2.5, as by two samples beside sixteen.
    torch.testing.assert_close(found, (16 * offsets + 2 * 2.5) / 18)


def test_more_experts_than_are_tried_cost_no_more() -> None:
    pairs = control_pairs(made_up(experts=64), 0)
    assert len(pairs) == 8 * control_size(200) == 8 * 16
    assert len({sample for sample, _ in pairs}) == 16
    best = made_up(experts=64).argmin(1)
    assert all((sample, int(best[sample])) in pairs for sample, _ in pairs)


def test_experts_far_apart_get_exact_losses(shared_family, merge, tmp_path, monkeypatch, caplog):
    """Estimates turned round stand for experts that leave the region where first order holds."""
    out = merge(shared_family.recipe())
    with opened_stage(out, tmp_path, batch_tokens=64, losses="exact") as stage:
        exact = sample_losses(stage)
    monkeypatch.setattr("upit_merge.router.assignment.loss_sweeps", lambda *_: 1.0)
    original = engine.MeanSweeps._multiply
    monkeypatch.setattr(
        engine.MeanSweeps,
        "_multiply",
        lambda self, layer, mean, parts, tapes, products: (
            original(self, layer, mean, parts, tapes, products),
            products.neg_(),
        ),
    )
    with opened_stage(out, tmp_path, batch_tokens=64) as stage:
        found = sample_losses(stage)
    assert torch.equal(found.sums, exact.sums)
    assert found.told["by"] == "exact"
    assert found.told["control"]["given_up"] > 0
    assert "too far apart for losses to first order" in caplog.text
    caplog.clear()
    with opened_stage(out, tmp_path, batch_tokens=64, losses="first_order") as stage:
        assert sample_losses(stage).told["by"] == "first_order"
    assert "Use losses: auto, or exact" in caplog.text


def test_auto_takes_first_order_where_it_holds(tmp_path, merge, monkeypatch) -> None:
    """Experts close to each other: the choice is the exact one, the levels are near."""
    family = build_family(tmp_path, count=3, noise=0.004)
    out = merge(family.recipe())
    monkeypatch.setattr("upit_merge.router.assignment.loss_sweeps", lambda *_: 1.0)
    samples = some_samples(40)
    with opened_stage(out, tmp_path, samples, batch_tokens=64) as stage:
        found = sample_losses(stage)
        exact = stage.losses()
    assert found.told["by"] == "first_order"
    assert found.told["control"]["samples"] == 16
    agree = (found.means.argmin(1) == exact.means.argmin(1)).double().mean()
    assert agree > 0.9
    torch.testing.assert_close(found.means, exact.means, rtol=0, atol=2e-3)
