"""One adapter as an input: every tensor is what PEFT makes of it; and how alike several are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Family, build_family
from tests.support.lora import (
    FFN,
    KINDS,
    adapters,
    assert_grams,
    dense_grams,
    opened_inputs,
    save_adapter,
    with_adapters,
)
from tests.support.naive import load_model
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.passes import measure_similarity
from upit_merge.models.lora.adapter import Adapter, open_model
from upit_merge.models.lora.low_rank import LowRank, factor_gram
from upit_merge.output import journal as resume

CPU = (torch.device("cpu"),)
# ---- one adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_pefts(shared_family: Family, tmp_path: Path, kind: str) -> None:
    merged = save_adapter(shared_family.base, tmp_path / "adapter", **KINDS[kind])
    with (
        closing(Checkpoint("base", shared_family.base, OpenOptions())) as base,
        closing(open_adapter(tmp_path / "adapter", base)) as adapter,
    ):
        assert adapter.specs.keys() == merged.keys()
        changed = 0
        for name in merged:
            ours = adapter.tensor(name)
            torch.testing.assert_close(ours, merged[name], rtol=0, atol=1e-6)
            changed += not torch.equal(ours, base.tensor(name))
            pieces = [adapter.rows(name, i, i + 1) for i in range(adapter.specs[name].shape[0])]
            assert torch.equal(torch.cat(pieces), ours) or KINDS[kind].get("use_dora")
        assert changed >= 3


def open_adapter(folder: Path, base: Checkpoint, options: OpenOptions | None = None) -> Adapter:
    model = open_model(str(folder), base, options or OpenOptions(), lambda *_: base)
    assert isinstance(model, Adapter)
    return model


def test_values_are_rounded_once(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """With a base in bfloat16 the sum is rounded, not its parts."""
    family = build_family(tmp_path, count=0, dtype=torch.bfloat16)
    folder = tmp_path / "lora" / "checkpoint-500"
    save_adapter(family.base, folder, target_modules=FFN)
    base, factors = load_model(family.base), load_file(folder / "adapter_model.safetensors")
    out = load_model(merge(adapters(family)))
    name = "model.layers.1.mlp.up_proj.weight"
    prefix = f"base_model.model.{name.removesuffix('.weight')}."
    delta = factors[f"{prefix}lora_B.weight"].double() @ factors[f"{prefix}lora_A.weight"].double()
    expected = (base[name].double() + 1.5 * delta).float().bfloat16()
    ours = out["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert ours.dtype == torch.bfloat16
    assert (ours != expected).float().mean() < 1e-3  # ties of the float32 sum


def test_a_pickled_adapter(family: Family, tmp_path: Path) -> None:
    save_adapter(family.base, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    with closing(Checkpoint("base", family.base, OpenOptions())) as base:
        first = open_adapter(tmp_path / "a", base)
        second = open_adapter(tmp_path / "b", base, OpenOptions(allow_pickle=True))
        for name in first.specs:
            assert torch.equal(first.tensor(name), second.tensor(name))


# ---- how alike adapters are ----------------------------------------------------------------


def test_factors_have_the_inner_products_of_their_products() -> None:
    torch.manual_seed(0)
    deltas = [
        LowRank(scale, torch.randn(37, rank), torch.randn(rank, 23)) if rank else None
        for scale, rank in ((0.5, 3), (2.0, 8), (1.0, 0), (-1.0, 1), (1.0, 0))
    ]
    dense = torch.stack(
        [
            (d.scale * d.up.double() @ d.down.double()).ravel() if d else torch.zeros(37 * 23)
            for d in deltas
        ]
    )
    gram = factor_gram(deltas)
    torch.testing.assert_close(gram, dense @ dense.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.T)
    assert not factor_gram([None, None]).any()


def test_comparing_adapters_does_not_read_the_base(lora: Any, monkeypatch: Any) -> None:
    """Nor any other checkpoint's rows; the result is that of the merged models."""
    family, merged = lora
    with opened_inputs(adapters(family)) as inputs:
        monkeypatch.setattr(Checkpoint, "rows", None)
        monkeypatch.setattr(Adapter, "rows", None)
        gram = measure_similarity(inputs, CPU, quiet=True)
    assert_grams(gram, dense_grams(load_model(family.base), merged))


@pytest.mark.parametrize("kind", ["DoRA", "one layer", "ranks of their own"])
def test_gram_of_other_kinds(family: Family, kind: str) -> None:
    merged = with_adapters(family, 2, **KINDS[kind])
    with opened_inputs(adapters(family)) as inputs:
        gram = measure_similarity(inputs, CPU, quiet=True)
    assert_grams(gram, dense_grams(load_model(family.base), merged))


def test_one_pass_finds_the_same_gram(lora: Any, tmp_path: Path, merge: Any) -> None:
    """As many experts as adapters: they are compared while they are written."""
    family, _merged = lora
    document = adapters(family)
    journal: dict[int, torch.Tensor] = {}
    append = resume.Journal.append

    def spy(self: Any, grams: Any, written: Any) -> None:
        journal.update(grams)
        append(self, grams, written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Journal, "append", spy)
        merge(document)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(inputs, CPU, quiet=True)
    assert torch.equal(torch.stack([journal[i] for i in range(len(journal))]), gram)


@pytest.mark.parametrize("changed", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changed_is_noticed(family: Family, changed: str) -> None:
    with_adapters(family, 1)
    with opened_inputs(adapters(family)) as inputs:
        files = {path.resolve() for path in inputs.checkpoints[0].files()}
    folder = family.root / "lora" / "checkpoint-500"
    assert (folder / changed).resolve() in files
    assert {family.base / "config.json", family.base / "model.safetensors"} <= files
