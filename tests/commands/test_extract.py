"""`upit-merge extract`: a dense model that computes what one expert of a mixture does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_family
from tests.support.commands import done
from tests.support.families import CASES, MERGED, Case, logits, made
from tests.support.naive import load_model

COUNT = MERGED["num_experts"]
Tensors = dict[str, torch.Tensor]


def rewritten(out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The same folder, its tensors changed one by one."""
    path = out / "model.safetensors"
    save_file(
        {name: change(name, tensor.clone()) for name, tensor in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    return out


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 3 and len(tensor) == COUNT


def expert_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Every expert by another way, and by much."""
    if is_packed(name, tensor) or ".experts." in name:
        tensor += 0.05 * torch.randn(
            tensor.shape, generator=torch.manual_seed(len(name) + sum(map(ord, name)))
        )
    return tensor


def with_one_for_all(out: Path, folder: Path, experts: list[int]) -> Path:
    """A mixture whose experts are all the mean of these."""
    shutil.copytree(out, folder)
    stored = load_file(out / "model.safetensors")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if is_packed(name, tensor):
            return tensor[experts].mean(0).expand(tensor.shape).clone()
        number = expert_of(name)
        if number is None:
            return tensor
        same = [stored[name.replace(f".experts.{number}.", f".experts.{e}.")] for e in experts]
        return torch.stack(same).mean(0)

    return rewritten(folder, change)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_expert_s_stream_does(case: Case, tmp_path, merge) -> None:
    """As transformers does from both folders; the other one has this expert n times."""
    _, out = made(case, tmp_path / "family", merge)
    rewritten(out, moved)
    done("extract", out, tmp_path / "dense", "--expert", 2, "--quiet")
    expected = logits(with_one_for_all(out, tmp_path / "all", [2]))
    found = logits(tmp_path / "dense")
    assert float((found - expected).abs().max() / expected.abs().max()) < case.tolerance
    # The control: another expert is not it.
    done("extract", out, tmp_path / "other", "--expert", 1, "--quiet")
    other = logits(tmp_path / "other")
    assert float((other - expected).abs().max() / expected.abs().max()) > 10 * case.tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_what_was_never_trained_it_is_the_checkpoint(case: Case, tmp_path, merge) -> None:
    """All tensors, bit by bit, where the family is the same; and `extend` gives the expert back."""
    checkpoint, out = made(case, tmp_path / "family", merge)
    dense = tmp_path / "dense"
    done("extract", out, dense, "--expert", 3, "--quiet")
    old, new = (json.loads((f / "config.json").read_text()) for f in (checkpoint, dense))
    models = [AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (checkpoint, dense)]
    ours, theirs = (model.state_dict() for model in reversed(models))
    if old["model_type"] == new["model_type"] and not case.settings.get("use_double_wide_mlp"):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.allclose(logits(dense), logits(checkpoint), atol=1e-5, rtol=1e-5)
    text = "some <s> text"
    assert AutoTokenizer.from_pretrained(dense)(text) == AutoTokenizer.from_pretrained(out)(text)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.kind in ("llama", "qwen3", "granite", "lfm2", "gemma4_text")],
    ids=str,
)
def test_extended_by_it_a_mixture_has_the_expert_again(case: Case, tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", count=1, kind=case.kind, **case.settings)
    if case.settings.get("hidden_size_per_layer_input"):
        pytest.skip("cannot be computed layer by layer")
    recipe = family.recipe(
        architecture=case.architecture, parameters=MERGED | dict(case.parameters)
    )
    out = rewritten(merge(recipe), moved)
    done("extract", out, tmp_path / "dense", "--expert", 1, "--quiet")
    words = ["--data", family.seed_file(6, "few.jsonl"), "--quiet"]
    done("extend", out, "--model", tmp_path / "dense", *words)
    count = 0
    for name, tensor in load_model(out).items():
        if tensor.ndim == 3 and len(tensor) == COUNT + 1:
            assert torch.equal(tensor[COUNT], tensor[1])
            count += 1
        elif expert_of(name) == COUNT:
            twin = name.replace(f".experts.{COUNT}.", ".experts.1.")
            assert torch.equal(tensor, load_model(out)[twin])
            count += 1
    assert count


@pytest.mark.parametrize("experts", [[], [0, 3]])
def test_the_mean(tmp_path, merge, experts: list[int]) -> None:
    case = Case("qwen2", "glm4_moe", parameters={"shared": "split"})
    _, out = made(case, tmp_path / "family", merge)
    rewritten(out, moved)
    words = [word for expert in experts for word in ("--expert", expert)]
    done("extract", out, tmp_path / "dense", "--average", *words, "--quiet")
    mean = with_one_for_all(out, tmp_path / "all", experts or [0, 1, 2, 3])
    expected = logits(mean)
    assert float((logits(tmp_path / "dense") - expected).abs().max() / expected.abs().max()) < 1e-5
    told = (tmp_path / "dense" / "README.md").read_text()
    assert ("mean of experts 0 and 3" if experts else "mean of all 4 experts") in told
