"""The paper's joint training of one expert, against plain autograd one sample at a time."""

from __future__ import annotations

import math
import os
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conftest import Family, build_family
from tests.support.naive_tuning import (
    EXPERT,
    LENGTHS,
    bucket,
    by_dense_name,
    dense_model,
    naive_gradients,
    naive_loss,
    some_vectors,
)
from upit_merge.config.router import UpitObjective
from upit_merge.data.tokens import TokenizedSample
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.expert_tuning import (
    ExpertModel,
    TunedExpert,
    load_expert,
    padded_batch,
    positive_loss,
    tune_expert,
)

CPU = torch.device("cpu")


@pytest.fixture
def moe(shared_family: Family, merge) -> Iterator[Checkpoint]:
    with opened_mixture(merge(shared_family.recipe())) as opened:
        yield opened


def gradients_of(model: ExpertModel) -> dict[str, Tensor]:
    """By names in a dense model; in the mixture one FFN stands for the experts."""
    return {
        name.removeprefix("dense.").replace(".experts.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: n + m
        )


def tune(moe: Checkpoint, scratch: Path, samples: Any = None, **settings: Any) -> TunedExpert:
    seed = settings.pop("seed", 0)
    return tune_expert(
        moe,
        EXPERT,
        bucket() if samples is None else samples,
        UpitObjective(train_experts=True, **settings),
        seed=seed,
        device=CPU,
        scratch=scratch,
        quiet=True,
    )


def test_positive_loss() -> None:
    logits = torch.tensor([0.0, 3.0, -2.0, -1000.0])
    expected = (math.log(2) + math.log1p(math.exp(-3)) + math.log1p(math.exp(2)) + 1000) / 4
    assert positive_loss(logits).item() == pytest.approx(expected)
    assert positive_loss(torch.tensor([math.inf])).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(
    shared_family, moe, monkeypatch, recompute: bool, alpha: float
) -> None:
    """A padded batch, the head a few rows at a time, with and without recomputed activations."""
    monkeypatch.setattr("upit_merge.router.expert_tuning.LOGIT_ROWS", 7)
    vectors = some_vectors()
    model = load_expert(moe, EXPERT, UpitObjective(alpha=alpha), CPU)
    for layer in model.dense.model.layers:
        assert layer.gradient_checkpointing
        layer.gradient_checkpointing = recompute
    model.vectors.data.copy_(vectors)
    calls: list[Tensor] = []
    model.dense.model.layers[0].post_attention_layernorm.register_forward_hook(
        lambda _module, _inputs, output: calls.append(output)
    )
    loss = model.train()(**padded_batch(bucket()))["loss"]
    loss.backward()
    assert len(calls) == (2 if recompute else 1)
    expected_loss, expected = naive_gradients(dense_model(shared_family), vectors, alpha)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    assert_all_close(gradients_of(model), expected, 1e-6)
    # The routing loss reaches the FFN below the last router, but not the one above it.
    reached = expected["model.layers.0.mlp.up_proj.weight"].abs().max()
    assert reached > 1e-4
    assert (expected["model.layers.1.mlp.up_proj.weight"].abs().max() > 1e-4) == (alpha > 0)


@pytest.mark.parametrize("variant", ["tied", "sliding window", "qwen3", "padding id"])
def test_other_models(tmp_path, merge, variant: str) -> None:
    config: dict[str, Any] = {
        "tied": {"tie_word_embeddings": True},
        "sliding window": {"kind": "mistral", "sliding_window": 5},
        "qwen3": {"kind": "qwen3"},
        "padding id": {"attention_dropout": 0.5, "pad_token_id": None},
    }[variant]
    family = build_family(tmp_path, count=3, **config)
    vectors = some_vectors()
    with opened_mixture(merge(family.recipe())) as moe:
        assert ("lm_head.weight" in moe.specs) == (variant != "tied")
        if variant == "padding id":
            moe.config["pad_token_id"] = 259  # just outside the embedding table
        model = load_expert(moe, EXPERT, UpitObjective(alpha=0.5), CPU)
        model.vectors.data.copy_(vectors)
        loss = model.train()(**padded_batch(bucket()))["loss"]
        loss.backward()
    expected_loss, expected = naive_gradients(dense_model(family), vectors, 0.5)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    assert_all_close(gradients_of(model), expected, 1e-6)


def test_one_step_is_a_step_of_adamw(shared_family, moe, tmp_path) -> None:
    """What the Trainer does with the loss: no rescaling, no decay, all of the learning rate."""
    lr, alpha = 1e-3, 0.1
    given: list[Tensor] = []

    def keep(optimizer: Any, *_arguments: Any) -> None:
        given.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        tuned = tune(moe, tmp_path, alpha=alpha, epochs=1, batch_size=8, lr=lr)
    finally:
        handle.remove()
    dense = dense_model(shared_family)
    vectors = torch.zeros(2, 32, requires_grad=True)
    trained = {n: p for n, p in dense.named_parameters() if p.requires_grad}
    trained["vectors"] = vectors
    loss = naive_loss(dense, vectors, bucket(), alpha)
    loss.backward()
    assert tuned.loss == pytest.approx(loss.item(), abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
    assert 0.1 < norm < 0.9  # no clipping, which would hide a loss that is scaled
    assert len(given) == len(trained)
    assert torch.stack([g.norm() for g in given]).norm() == pytest.approx(norm.item(), rel=1e-5)
    torch.optim.AdamW([*trained.values()], lr=lr, weight_decay=0.0).step()
    after = by_dense_name(tuned.ffn) | {"vectors": tuned.vectors}
    # Adam's first step divides a gradient by its own size: tiny ones may fall either way.
    for name, parameter in trained.items():
        steady = parameter.grad.abs() > 1e-5
        assert steady.float().mean() > 0.8
        torch.testing.assert_close(
            after[name][steady], parameter.detach()[steady], rtol=0, atol=1e-6
        )


def test_training_lowers_the_loss_and_is_deterministic(shared_family, moe, tmp_path) -> None:
    settings = {"alpha": 0.5, "epochs": 6, "batch_size": 2, "lr": 2e-3}
    tuned = tune(moe, tmp_path, **settings)
    dense = dense_model(shared_family)
    with torch.no_grad():
        before = naive_loss(dense, torch.zeros(2, 32), bucket(), 0.5).item()
        dense.load_state_dict(by_dense_name(tuned.ffn), strict=False)
        after = naive_loss(dense, tuned.vectors, bucket(), 0.5).item()
    # Measured on the checkpoint's backbone: what was trained along with it must not matter.
    assert after < before - 0.3
    assert tuned.loss < before
    assert tuned.vectors.dtype == torch.float32
    assert tuned.vectors.shape == (2, 32)
    assert tuned.vectors.abs().amax(dim=1).min() > 0
    stored = {n: moe.tensor(n) for n in moe.specs if f".experts.{EXPERT}." in n}
    assert tuned.ffn.keys() == stored.keys()
    assert not any(torch.equal(tuned.ffn[name], stored[name]) for name in stored)
    torch.manual_seed(123)
    again = tune(moe, tmp_path, **settings)
    assert again.loss == tuned.loss
    assert torch.equal(again.vectors, tuned.vectors)
    assert all(torch.equal(again.ffn[name], tuned.ffn[name]) for name in stored)
    other = tune(moe, tmp_path, seed=2**40 + 1, **settings)  # more than numpy's generator takes
    assert not torch.equal(other.vectors, tuned.vectors)


def test_only_the_ffn_and_the_vectors_are_trained(moe, tmp_path, monkeypatch) -> None:
    made: list[ExpertModel] = []

    def remember(*arguments: Any, **options: Any) -> ExpertModel:
        made.append(load_expert(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("upit_merge.router.expert_tuning.load_expert", remember)
    for rank in (None, 2):
        tune(moe, tmp_path, epochs=1, lr=1e-2, lora_rank=rank)
        trained = {n for n, p in made[-1].named_parameters() if p.requires_grad}
        assert all(n == "vectors" or ".mlp." in n for n in trained)
        assert len(trained) == 1 + 6 * (1 if rank is None else 2)
        tensors = made[-1].dense.state_dict()
        backbone = [n for n in moe.specs if ".block_sparse_moe." not in n]
        assert len(backbone) == 2 + 1 + 2 * 6
        for name in backbone:
            assert torch.equal(tensors[name], moe.tensor(name))


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_changes_the_ffn_by_a_low_rank(shared_family, moe, tmp_path, rank: int) -> None:
    tuned = tune(moe, tmp_path, lora_rank=rank, epochs=6, batch_size=2, lr=1e-2)
    for name, tensor in tuned.ffn.items():
        values = torch.linalg.svdvals((tensor - moe.tensor(name)).double())
        assert values[rank - 1] > 1e-3
        assert values[rank] < 1e-5
    torch.manual_seed(99)
    again = tune(moe, tmp_path, lora_rank=rank, epochs=6, batch_size=2, lr=1e-2)
    assert all(torch.equal(again.ffn[name], tuned.ffn[name]) for name in tuned.ffn)
    dense = dense_model(shared_family)
    with torch.no_grad():
        before = naive_loss(dense, torch.zeros(2, 32), bucket(), 0.5).item()
        dense.load_state_dict(by_dense_name(tuned.ffn), strict=False)
        after = naive_loss(dense, tuned.vectors, bucket(), 0.5).item()
    assert after < before - 0.2


def test_lora_scale_and_merge(moe, tmp_path, monkeypatch) -> None:
    """The merged weight computes what the factors did, at twice the rank over the rank."""
    torch.manual_seed(0)
    model = load_expert(moe, EXPERT, UpitObjective(lora_rank=3), CPU)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    monkeypatch.setattr("upit_merge.router.expert_tuning.load_expert", lambda *_a, **_o: model)
    monkeypatch.setattr(
        "upit_merge.router.expert_tuning._train",
        lambda model, samples, *_settings, **_options: model(**padded_batch(samples)),
    )
    tuned = tune(moe, tmp_path, lora_rank=3)
    inputs = torch.randn(4, 32)
    for layer in range(2):
        module = model.dense.model.layers[layer].mlp.experts.up_proj
        weight = by_dense_name(tuned.ffn)[f"model.layers.{layer}.mlp.up_proj.weight"]
        torch.testing.assert_close(inputs @ weight.T, module(inputs), rtol=0, atol=1e-5)
        factors = module.lora_B["default"].weight @ module.lora_A["default"].weight
        expected = 2 * factors + module.base_layer.weight
        torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-6)


def test_the_loss_is_that_of_the_last_epoch(shared_family, moe, tmp_path) -> None:
    """With one batch per epoch, the second epoch starts from where a single one ends."""
    settings = {"alpha": 0.5, "batch_size": 5, "lr": 1e-2}
    once, twice = (tune(moe, tmp_path, epochs=epochs, **settings) for epochs in (1, 2))
    dense = dense_model(shared_family)
    dense.load_state_dict(by_dense_name(once.ffn), strict=False)
    with torch.no_grad():
        expected = naive_loss(dense, once.vectors, bucket(), 0.5).item()
    assert once.loss > expected + 0.1
    assert twice.loss == pytest.approx(expected, abs=1e-5)


def test_every_sample_has_its_turn(moe, tmp_path, monkeypatch) -> None:
    """Each epoch goes through all samples, in an order that follows the seed."""
    orders: list[list[int]] = []

    def spy(batch: list[TokenizedSample]) -> dict[str, Tensor]:
        orders[-1].extend(len(sample.input_ids) for sample in batch)
        return padded_batch(batch)

    monkeypatch.setattr("upit_merge.router.expert_tuning.padded_batch", spy)
    for seed in (0, 0, 1, 2):
        orders.append([])
        tune(moe, tmp_path, epochs=2, batch_size=2, seed=seed)
    for order in orders:
        assert sorted(order[:5]) == sorted(order[5:]) == sorted(length for length, _ in LENGTHS)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1


def test_an_empty_bucket_changes_nothing(moe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("upit_merge.router.expert_tuning.load_expert", None)
    tuned = tune(moe, tmp_path, [])
    assert math.isnan(tuned.loss)
    assert torch.equal(tuned.vectors, torch.zeros(2, 32))
    assert tuned.ffn.keys() == {n for n in moe.specs if f".experts.{EXPERT}." in n}
    for name, tensor in tuned.ffn.items():
        assert torch.equal(tensor, moe.tensor(name))


def test_the_stored_dtype_comes_back(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=3, dtype=torch.bfloat16)
    with opened_mixture(merge(family.recipe())) as moe:
        for rank in (None, 2):
            tuned = tune(moe, tmp_path / "scratch", epochs=1, lr=1e-2, lora_rank=rank)
            assert {tensor.dtype for tensor in tuned.ffn.values()} == {torch.bfloat16}
            assert tuned.vectors.dtype == torch.float32


def test_the_caller_notices_nothing(moe, tmp_path, monkeypatch, capfd) -> None:
    """Generators, environment, output and disk; under a launcher no other process is waited for."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    # Not what an earlier training with this seed could have left behind.
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    tune(moe, tmp_path / "scratch", epochs=1, lora_rank=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for now, then in zip(np.random.get_state(), states[2], strict=True):
        assert np.array_equal(now, then)
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()
    assert not list((tmp_path / "scratch").glob("*"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("rank", [None, 2])
def test_training_that_diverges_is_told(moe, tmp_path, rank: int | None) -> None:
    with pytest.raises(UpitError, match=r"Expert 1 is NaN .* lower `router\.upit\.lr`"):
        tune(moe, tmp_path, lr=1e30, epochs=3, lora_rank=rank)


def test_the_model_is_gone_afterwards(moe, tmp_path, monkeypatch) -> None:
    """The next expert is loaded into the same memory."""
    left: list[weakref.ref[ExpertModel]] = []

    def remember(*arguments: Any) -> ExpertModel:
        model = load_expert(*arguments)
        left.append(weakref.ref(model))
        return model

    monkeypatch.setattr("upit_merge.router.expert_tuning.load_expert", remember)
    tune(moe, tmp_path, epochs=1)
    assert [reference() for reference in left] == [None]
