"""`router.compute`: which dtype that is where, and what it changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.commands import done
from tests.support.seeds import some_samples
from upit_merge.commands import router as router_command
from upit_merge.config.router import RouterSettings
from upit_merge.engine.arithmetic import Arithmetic, has_fast_bfloat16
from upit_merge.engine.assembled import AssembledMixture
from upit_merge.engine.hidden_states import PackedStates, Stream
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.memory import ModelShape, router_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, SINGLE = torch.bfloat16, torch.float32
MIXED = Arithmetic(SINGLE, HALF)


@pytest.mark.parametrize(
    ("compute", "device", "stored", "quick", "states", "products"),
    [
        ("auto", CPU, HALF, False, SINGLE, SINGLE),
        ("auto", CPU, HALF, True, SINGLE, HALF),
        ("float32", CPU, HALF, True, SINGLE, SINGLE),
        ("bfloat16", CPU, SINGLE, False, SINGLE, HALF),
        ("auto", CUDA, torch.float16, True, torch.float16, torch.float16),
        ("auto", CUDA, SINGLE, True, SINGLE, SINGLE),
        ("float32", CUDA, HALF, True, SINGLE, SINGLE),
        ("bfloat16", CUDA, SINGLE, False, HALF, HALF),
    ],
)
def test_what_the_setting_means(compute, device, stored, quick, states, products) -> None:
    found = Arithmetic.of(compute, device, stored, quick=quick)
    assert found == Arithmetic(states, products)


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ({}, False),
        ({"avx512_f": True, "amx_int8": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_which_machines_are_fast(monkeypatch, flags, fast) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert has_fast_bfloat16() == fast


@pytest.mark.parametrize(
    ("name", "fast"),
    [("_is_avx512_bf16_supported", True), ("_is_amx_tile_supported", True), ("_is_new", False)],
)
def test_which_machines_are_fast_by_an_older_torch(monkeypatch, name, fast) -> None:
    for known in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, known, raising=False)
    monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    assert has_fast_bfloat16() == fast


def swept(out: Path, arithmetic: Arithmetic | None, tmp_path: Path, expert: int) -> tuple:
    """Hidden states after the last layer, and the losses, of one expert."""
    samples = some_samples()
    lengths = [len(sample.input_ids) for sample in samples]
    with opened_mixture(out) as moe:
        model = LayerwiseMixture(moe, CPU, arithmetic)
        states = PackedStates(
            lengths, model.hidden_size, model.dtype, scratch=tmp_path, budget_bytes=1e9
        )
        stream = Stream(expert, (tuple(range(len(samples))),))
        model.sweep(samples, [stream], states, on_progress=lambda _: None)
        return states.rows, model.losses(samples, states)


def test_products_are_rounded_and_nothing_else(shared_family, merge, tmp_path) -> None:
    """The states stay float32: they hold what bfloat16 cannot, and are near the exact ones."""
    out = merge(shared_family.recipe())
    exact, exact_losses = swept(out, None, tmp_path, 1)
    rounded, losses = swept(out, MIXED, tmp_path, 1)
    assert rounded.dtype == SINGLE
    assert not torch.equal(rounded, exact)
    assert not torch.equal(rounded, rounded.bfloat16().float())
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-5 < error < 5e-3
    torch.testing.assert_close(losses, exact_losses, rtol=2e-3, atol=0)
    with opened_mixture(out) as moe:
        model = LayerwiseMixture(moe, CPU, MIXED)
        assert {t.dtype for t in model.ffn(0, 0).values()} == {HALF}
        dtypes = {name: t.dtype for name, t in model.backbone(0).items()}
    assert {d for name, d in dtypes.items() if "norm" in name} == {SINGLE}
    assert {d for name, d in dtypes.items() if "_proj.weight" in name} == {HALF}


def test_routing_is_decided_in_float32(shared_family, merge, tmp_path) -> None:
    out = merge(shared_family.recipe())
    samples = some_samples()
    found = {}
    with opened_mixture(out) as moe:
        for arithmetic in (None, MIXED):
            model = LayerwiseMixture(moe, CPU, arithmetic)
            lengths = [len(sample.input_ids) for sample in samples]
            states = PackedStates(
                lengths, model.hidden_size, model.dtype, scratch=tmp_path, budget_bytes=1e9
            )
            seen: list[torch.Tensor] = []
            AssembledMixture(model).sweep(
                samples,
                [tuple(range(len(samples)))],
                states,
                on_routing=lambda _l, _b, logits, _c, seen=seen: seen.append(logits),
                on_progress=lambda _: None,
            )
            found[arithmetic] = seen, states.rows
    for logits in found[MIXED][0]:
        assert not torch.equal(logits, logits.bfloat16().float())
    error = (found[MIXED][1] - found[None][1]).norm() / found[None][1].norm()
    assert error < 5e-3


def report_of(out: Path) -> dict:
    return json.loads((out / "upit_report.json").read_text())["router"]


def test_the_report_says_what_was_taken(shared_family, merge, monkeypatch) -> None:
    data = str(shared_family.seed_file())
    out = merge(shared_family.recipe(router={"data": data, "compute": "bfloat16"}))
    assert report_of(out)["settings"]["compute"] == "bfloat16"
    assert report_of(out)["compute"] == "bfloat16"
    # As it was computed, so it is verified; refitting in float32 would not give the same bits.
    recipe = out / "mergekit_config.yml"
    assert recipe.exists()
    assert "fitted again: the same bits" in done("verify", str(out), "--gates").output
    done("router", str(out), "--data", data, "--quiet")
    assert report_of(out)["settings"]["compute"] == "auto"
    assert report_of(out)["compute"] == ("bfloat16" if has_fast_bfloat16() else "float32")
    # On a machine with fast products `auto` takes them, and says so.
    monkeypatch.setattr(router_command, "has_fast_bfloat16", lambda: True)
    done("router", str(out), "--data", data, "--quiet", "--seed", "1")
    assert report_of(out)["settings"]["compute"] == "auto"
    assert report_of(out)["compute"] == "bfloat16"


def test_kinds_of_machines_are_not_mixed(shared_family, merge, monkeypatch) -> None:
    """What was begun with fast products starts over on a machine without."""
    data = str(shared_family.seed_file())
    out = merge(shared_family.recipe())
    calls = []
    original = LayerwiseMixture.losses

    def cut(self: LayerwiseMixture, *args, **options):
        calls.append(self.arithmetic.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(LayerwiseMixture, "losses", cut)
    monkeypatch.setattr(router_command, "has_fast_bfloat16", lambda: True)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        done("router", str(out), "--data", data, "--quiet")
    monkeypatch.setattr(router_command, "has_fast_bfloat16", lambda: False)
    done("router", str(out), "--data", data, "--quiet")
    assert calls == ["bfloat16"] * 3 + ["float32"] * 3


def test_evaluation_is_exact_unless_asked(shared_family, merge, monkeypatch) -> None:
    data = str(shared_family.seed_file())
    out = merge(shared_family.recipe(router={"data": data}))
    seen = []
    original = LayerwiseMixture.losses

    def look(self: LayerwiseMixture, *args, **options):
        seen.append(self.arithmetic.name)
        return original(self, *args, **options)

    monkeypatch.setattr(LayerwiseMixture, "losses", look)
    done("evaluate", str(out), "--data", data, "--quiet")
    assert set(seen) == {"float32"}
    seen.clear()
    done("evaluate", str(out), "--data", data, "--quiet", "--compute", "bfloat16")
    assert set(seen) == {"bfloat16"}


def test_memory_follows() -> None:
    shape = ModelShape(1024, 4096, 32_000, 16, 8, 4 * 1024**2, itemsize=2)
    settings = RouterSettings(data="-", batch_tokens=512, losses="exact")
    lengths = [100] * 50
    exact = router_memory(shape, lengths, settings, cpu=True)
    assert exact == router_memory(
        shape, lengths, settings, cpu=True, arithmetic=Arithmetic(SINGLE, SINGLE)
    )
    mixed = router_memory(shape, lengths, settings, cpu=True, arithmetic=MIXED)
    assert mixed.states == exact.states
    assert mixed.compute <= exact.compute
    on_gpu = router_memory(shape, lengths, settings, cpu=False)
    assert on_gpu == router_memory(
        shape, lengths, settings, cpu=False, arithmetic=Arithmetic(HALF, HALF)
    )
    assert on_gpu.states * 2 == exact.states
