"""Outputs are what vLLM's loaders for Mixtral and Qwen3-MoE take, by the rules they follow.

vLLM wants a GPU, so its rules are restated here (read in version 0.33: `models/mixtral.py`,
`models/qwen3_moe.py` and the expert mapping of its fused layer). A loader renames what it finds in
the files, and fills the parts of its own parameters: queries, keys and values are one of them, the
experts of a layer two.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.conftest import build_family
from tests.support.naive import load_model
from upit_merge.models.formats import FORMATS

KINDS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
# What the loader calls the three matrices of an expert in a file, by the part they are of its own.
SHARDS = {
    "mixtral": {"w1": "w1", "w2": "w2", "w3": "w3"},
    "qwen3_moe": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
BLOCK = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}

# A part of a parameter: its name, and which part (None: all of it).
Part = tuple[str, object]
Shape = tuple[int, ...]


@pytest.fixture(params=KINDS)
def out(request: pytest.FixtureRequest, tmp_path: Path, merge: Callable[..., Path]) -> Path:
    """A mixture of four experts, one of them a child; Mistral's embeddings are tied."""
    tied = request.param == "mistral"
    family = build_family(tmp_path, kind=request.param, tie_word_embeddings=tied)
    return merge(family.recipe(parameters={"num_experts": 4}))


def wanted(config: Any, kind: str) -> dict[Part, Shape]:
    """Every part of every parameter that the model class makes, with its shape."""
    hidden, head = config.hidden_size, config.head_dim
    inner = config.intermediate_size if kind == "mixtral" else config.moe_intermediate_size
    experts = config.num_local_experts if kind == "mixtral" else config.num_experts
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    parts: dict[Part, Shape] = {
        ("model.embed_tokens.weight", None): (config.vocab_size, hidden),
        ("model.norm.weight", None): (hidden,),
    }
    if not config.tie_word_embeddings:
        parts["lm_head.weight", None] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        parts[f"{prefix}.input_layernorm.weight", None] = (hidden,)
        parts[f"{prefix}.post_attention_layernorm.weight", None] = (hidden,)
        parts[f"{attention}.qkv_proj.weight", "q"] = (queries, hidden)
        parts[f"{attention}.qkv_proj.weight", "k"] = (keys, hidden)
        parts[f"{attention}.qkv_proj.weight", "v"] = (keys, hidden)
        parts[f"{attention}.o_proj.weight", None] = (hidden, queries)
        if kind == "qwen3_moe":
            parts[f"{attention}.q_norm.weight", None] = (head,)
            parts[f"{attention}.k_norm.weight", None] = (head,)
        block = f"{prefix}.{BLOCK[kind]}"
        parts[f"{block}.gate.weight", None] = (experts, hidden)
        for expert in range(experts):
            parts[f"{block}.experts.w13_weight", (expert, "w1")] = (inner, hidden)
            parts[f"{block}.experts.w13_weight", (expert, "w3")] = (inner, hidden)
            parts[f"{block}.experts.w2_weight", (expert, "w2")] = (hidden, inner)
    return parts


def taken(name: str, kind: str, num_experts: int) -> Part | None:
    """The part that a tensor of a file fills; None if the loader would skip it."""
    if "rotary_emb.inv_freq" in name:
        return None
    if ".experts." in name:
        for expert in range(num_experts):
            for shard, projection in SHARDS[kind].items():
                if (within := f"experts.{expert}.{projection}.") in name:
                    fused = "experts.w2_" if shard == "w2" else "experts.w13_"
                    return name.replace(within, fused), (expert, shard)
        return name, None
    for projection in "qkv":
        if f".{projection}_proj" in name:
            return name.replace(f".{projection}_proj", ".qkv_proj"), projection
    return name, None


def misfits(names: Iterable[str], parts: Mapping[Part, Shape], kind: str, experts: int) -> set[str]:
    """What would be left unfilled, filled twice or not be known."""
    counts = Counter(part for name in names if (part := taken(name, kind, experts)) is not None)
    wrong = {f"unknown: {part}" for part in counts if part not in parts}
    wrong |= {f"twice: {part}" for part, count in counts.items() if count > 1}
    return wrong | {f"unfilled: {part}" for part in parts if part not in counts}


def test_every_tensor_fills_its_part_of_a_parameter(out: Path) -> None:
    config = AutoConfig.from_pretrained(out)  # as vLLM reads it
    kind = config.model_type
    weights, parts = load_model(out), wanted(config, kind)
    assert misfits(weights, parts, kind, 4) == set()
    for name, tensor in weights.items():
        part = taken(name, kind, 4)
        assert part is not None
        assert tuple(tensor.shape) == parts[part], name


def test_other_names_would_not_fit(out: Path) -> None:
    """The controls: fused experts, experts one too many, a head that is not there."""
    config = AutoConfig.from_pretrained(out)
    kind = config.model_type
    names, parts = list(load_model(out)), wanted(config, kind)
    expert = re.compile(r"experts\.\d+\.\w+\.weight")
    fused = [name for name in names if not expert.search(name)]
    fused.append("model.layers.0.mlp.experts.gate_up_proj")
    assert "unknown: ('model.layers.0.mlp.experts.gate_up_proj', None)" in misfits(
        fused, parts, kind, 4
    )
    assert len(misfits([*names, names[0]], parts, kind, 4)) == 1
    beyond = FORMATS[kind].expert_tensor(0, 4, "up_proj")
    assert misfits([*names, beyond], parts, kind, 4) == {f"unknown: {(beyond, None)}"}
    without = [name for name in names if name != FORMATS[kind].gate_tensor(1)]
    gate = (f"model.layers.1.{BLOCK[kind]}.gate.weight", None)
    assert misfits(without, parts, kind, 4) == {f"unfilled: {gate}"}


def test_the_configuration_names_what_the_model_classes_read(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    kind = config["model_type"]
    assert config["architectures"] == [FORMATS[kind].class_name]
    fields = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    fields += ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "vocab_size"]
    fields += ["max_position_embeddings", "num_experts_per_tok", FORMATS[kind].count_field]
    for field in fields:
        assert config[field] is not None, field
    assert config["hidden_act"] == "silu"  # all that the fused layer has
    assert config["torch_dtype"] == "float32"
    if kind == "qwen3_moe":
        assert config["norm_topk_prob"] is True
        assert config["decoder_sparse_step"] == 1
        assert config["mlp_only_layers"] == []
        assert config.get("shared_expert_intermediate_size", 0) == 0
        assert config["moe_intermediate_size"] == config["intermediate_size"]
    read = AutoConfig.from_pretrained(out)
    assert read.rope_parameters["rope_theta"] == config["rope_theta"]
