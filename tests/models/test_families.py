"""Every dense family, in every format it can become: n identical experts are the dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.conftest import TINY, build_family
from tests.support.families import CASES, MERGED, TOKENS, Case, logits, made
from tests.support.lora import adapters, with_adapters
from tests.support.naive import load_model
from upit_merge.errors import UpitError
from upit_merge.models.families import FAMILIES


def tensor_of_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, TINY["vocab_size"], (1, TOKENS), generator=generator)


def far_apart(case: Case, dense: Path, out: Path) -> float:
    """Largest difference of logits over the largest logit."""
    expected = logits(dense)
    return float((logits(out) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identical_experts_are_the_dense_model(case: Case, tmp_path, merge) -> None:
    dense, out = made(case, tmp_path, merge)
    assert json.loads((out / "config.json").read_text())["model_type"] == case.architecture
    assert far_apart(case, dense, out) < case.tolerance
    # The control: with one expert moved a little it must not be, if tokens are sent to it.
    weights = load_file(out / "model.safetensors")
    assert any(
        far_apart(case, dense, with_moved_expert(out, weights, expert)) > case.tolerance
        for expert in reversed(range(MERGED["num_experts"]))
    )


def with_moved_expert(out: Path, weights: Mapping[str, torch.Tensor], expert: int) -> Path:
    """The mixture, but one expert of every layer is not like the others."""
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in moved.items():
        if tensor.ndim == 3 and len(tensor) == MERGED["num_experts"]:
            tensor[expert] += 1e-3 * torch.randn(tensor.shape[1:])
        elif f".experts.{expert}." in name:
            tensor += 1e-3 * torch.randn(tensor.shape)
    save_file(moved, out / "model.safetensors", {"format": "pt"})
    return out


def test_every_family_in_every_format_is_among_them() -> None:
    tried = {(case.kind, case.architecture) for case in CASES}
    pairs = {(f.model_type, target) for f in FAMILIES.values() for target in f.targets}
    assert pairs - tried == {("seed_oss", "granitemoe")}


def test_a_tied_model_has_both_tables_where_readers_do_not_tie(tmp_path, merge) -> None:
    """vLLM and mlx-lm take no embeddings for the head of a GLM-4-MoE."""
    _, out = made(Case("qwen2", "glm4_moe", {"tie_word_embeddings": True}), tmp_path, merge)
    weights = load_file(out / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("room", [2, 9])
def test_the_tokens_of_glm_take_spare_rows(tmp_path, merge, caplog, room: int) -> None:
    """llama.cpp's converter looks for them; where there is no room, a sentence says so."""
    case = Case("qwen2", "glm4_moe", {"vocab_size": TINY["vocab_size"] + room})
    dense, out = made(case, tmp_path, merge)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (dense, out))
    text = "Some text, with <s> and <|user|> in it."
    wanted = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>")
    first = TINY["vocab_size"]
    if room < len(wanted):
        assert "[gMASK]" not in after.get_vocab()
        assert "llama.cpp's converter looks for the tokens [gMASK], <|user|>" in caplog.text
        return
    assert [after.get_vocab()[token] for token in wanted] == [*range(first, first + 4)]
    assert after(text)["input_ids"] != before(text)["input_ids"]
    plain = text.replace("<|user|>", "a user")
    assert after(plain)["input_ids"] == before(plain)["input_ids"]
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


def test_adapters_on_fused_matrices(tmp_path, merge) -> None:
    """LoRA on Phi-3's fused inputs: as PEFT merges it, then cut."""
    family = build_family(tmp_path, count=1, kind="phi3")
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    expected = with_adapters(family, count=2, target_modules=modules)
    written = load_model(merge(adapters(family, parameters={"backbone": "last"})))
    for layer in range(2):
        attention, inner = f"model.layers.{layer}.self_attn", TINY["intermediate_size"]
        fused = expected[-1][f"{attention}.qkv_proj.weight"]
        parts = [written[f"{attention}.{name}_proj.weight"] for name in "qkv"]
        torch.testing.assert_close(torch.cat(parts), fused, rtol=0, atol=1e-6)
        for expert, model in enumerate(expected):
            both = model[f"model.layers.{layer}.mlp.gate_up_proj.weight"]
            place = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate, up, down = (written[f"{place}.{name}.weight"] for name in ("w1", "w3", "w2"))
            torch.testing.assert_close(gate, both[:inner], rtol=0, atol=1e-6)
            torch.testing.assert_close(up, both[inner:], rtol=0, atol=1e-6)
            whole = model[f"model.layers.{layer}.mlp.down_proj.weight"]
            torch.testing.assert_close(down, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "architecture", "parameters", "told"),
    [
        ("llama", "auto", {"shared": "split"}, "a Mixtral has none; leave it out or write archit"),
        ("qwen2", "auto", {"shared": "none"}, "has zero or split; leave it out or write architec"),
        ("qwen3", "auto", {"dense_layers": 1}, "every layer of a Qwen3-MoE is a mixture; leave it"),
        ("llama", "glm4_moe", {"dense_layers": 2}, "the models have 2 layers, of which one must"),
        ("qwen2", "auto", {"num_experts": 1}, "the router of a GLM-4-MoE needs 2; raise num_exp"),
    ],
)
def test_what_a_format_has_not_is_refused(
    tmp_path, merge, kind: str, architecture: str, parameters: dict[str, Any], told: str
) -> None:
    family = build_family(tmp_path, kind=kind, count=2)
    with pytest.raises(UpitError) as caught:
        merge(family.recipe(architecture=architecture, parameters=parameters))
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()
