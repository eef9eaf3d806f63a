"""Outputs are what llama.cpp's converter takes: names, settings, tokenizer; and a GGUF made of one.

The converter itself is a script and no package. What it does with a Mixtral or a Qwen3-MoE is
restated here; the names of GGUF and its files are the `gguf` package's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import VOCABULARY, build_family
from tests.support.naive import load_model
from upit_merge.models.formats import FORMATS

NUM_EXPERTS = 4
KINDS = {"llama": "mixtral", "qwen3": "qwen3_moe"}
ARCHITECTURES = {"mixtral": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
# What an expert's three matrices are called together, once they are stacked.
STACKED = {
    "mixtral": "layers.{layer}.feed_forward.experts.{projection}.weight",
    "qwen3_moe": "model.layers.{layer}.mlp.experts.{projection}.weight",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")


@pytest.fixture(params=KINDS, ids=lambda kind: KINDS[kind])
def out(request: pytest.FixtureRequest, tmp_path: Path, merge: Callable[..., Path]) -> Path:
    """A mixture of four experts, one of them a child; Qwen3's embeddings are tied."""
    tied = request.param == "qwen3"
    family = build_family(tmp_path, kind=request.param, tie_word_embeddings=tied)
    return merge(family.recipe(parameters={"num_experts": NUM_EXPERTS}))


def read_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def rope_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp rotates them: pairs side by side, not in two halves."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def converted(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF name and tensor of everything in a model, as the converter gives them.

    Raises:
        ValueError: a tensor has no place in GGUF, or experts are incomplete.
    """
    kind = config["model_type"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config["num_hidden_layers"])

    def mapped(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"Can not map tensor {name!r}")
        return found

    experts: dict[tuple[int, str], dict[int, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            layer, expert, projection = int(match[1]), int(match[2]), match[3]
            experts.setdefault((layer, projection), {})[expert] = tensor
            continue
        if kind == "mixtral" and name.endswith(("q_proj.weight", "k_proj.weight")):
            group = "attention" if name.endswith("q_proj.weight") else "key_value"
            tensor = rope_order(tensor, config[f"num_{group}_heads"])
        yield mapped(name), tensor
    count = config[FORMATS[kind].count_field]
    for (layer, projection), tensors in experts.items():
        if sorted(tensors) != list(range(count)):
            raise ValueError(f"Unprocessed experts: {layer} {projection} {sorted(tensors)}")
        stacked = torch.stack([tensors[expert] for expert in range(count)])
        yield mapped(STACKED[kind].format(layer=layer, projection=projection)), stacked


def expected_names(config: Mapping[str, Any]) -> set[str]:
    """What llama.cpp's loader asks of a mixture of this kind."""
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate_inp"]
    parts += ["ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"]
    if config["model_type"] == "qwen3_moe":
        parts += ["attn_q_norm", "attn_k_norm"]
    layers = range(config["num_hidden_layers"])
    names = {f"blk.{layer}.{part}.weight" for layer in layers for part in parts}
    names |= {"token_embd.weight", "output_norm.weight"}
    # Without a head the loader takes the embeddings.
    return names if config["tie_word_embeddings"] else names | {"output.weight"}


def write_gguf(out: Path, path: Path) -> None:
    """Settings, vocabulary and tensors of a folder as one GGUF file, float32."""
    config = read_config(out)
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config[FORMATS[kind].count_field])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    else:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    writer.add_tokenizer_model(gguf.BpeVocab.tokenizer_model)
    vocabulary = list(gguf.BpeVocab(out).all_tokens())
    writer.add_token_list([token for token, _score, _kind in vocabulary])
    writer.add_token_types([kind for _token, _score, kind in vocabulary])
    gguf.SpecialVocab(out, n_vocab=config["vocab_size"]).add_to_gguf(writer, quiet=True)
    for name, tensor in converted(load_model(out), config):
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_tensor_has_its_place_in_gguf(out: Path) -> None:
    config = read_config(out)
    found = [name for name, _tensor in converted(load_model(out), config)]
    assert len(found) == len(set(found))
    assert set(found) == expected_names(config)


def test_names_that_transformers_has_in_memory_have_none(out: Path) -> None:
    """The control: with fused experts, as a careless `state_dict` has them, it must not map."""
    config, weights = read_config(out), load_model(out)
    fused = torch.zeros(NUM_EXPERTS, 2 * config["intermediate_size"], config["hidden_size"])
    weights["model.layers.0.mlp.experts.gate_up_proj"] = fused
    with pytest.raises(ValueError, match=r"Can not map tensor .*gate_up_proj"):
        list(converted(weights, config))


def test_a_missing_expert_would_be_noticed(out: Path) -> None:
    """The other control: experts that cannot be stacked."""
    config, weights = read_config(out), load_model(out)
    weights.pop(FORMATS[config["model_type"]].expert_tensor(1, 2, "up_proj"))
    with pytest.raises(ValueError, match="Unprocessed experts"):
        list(converted(weights, config))


def test_a_gguf_file_holds_the_mixture(out: Path, tmp_path: Path) -> None:
    write_gguf(out, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    config, weights = read_config(out), load_model(out)
    form = FORMATS[config["model_type"]]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == expected_names(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    # GGUF lists sizes from the innermost on.
    assert tensors["blk.1.ffn_up_exps.weight"].shape.tolist() == [hidden, inner, NUM_EXPERTS]
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [inner, hidden, NUM_EXPERTS]
    assert tensors["blk.1.ffn_gate_inp.weight"].shape.tolist() == [hidden, NUM_EXPERTS]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stacked = tensors[f"blk.1.ffn_{projection.removesuffix('_proj')}_exps.weight"].data
        for expert in range(NUM_EXPERTS):
            written = weights[form.expert_tensor(1, expert, projection)]
            np.testing.assert_array_equal(stacked[expert], written.float().numpy())
    gate = tensors["blk.1.ffn_gate_inp.weight"].data
    np.testing.assert_array_equal(gate, weights[form.gate_tensor(1)].float().numpy())


def test_a_gguf_file_holds_the_settings_and_the_vocabulary(out: Path, tmp_path: Path) -> None:
    write_gguf(out, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kind = "llama" if read_config(out)["model_type"] == "mixtral" else "qwen3moe"

    def field(name: str) -> Any:
        found = reader.get_field(name)
        assert found is not None, name
        return found.contents()

    assert field("general.architecture") == kind
    assert field(f"{kind}.expert_count") == NUM_EXPERTS
    assert field(f"{kind}.expert_used_count") == 2
    assert field(f"{kind}.attention.head_count_kv") == 2
    assert field(f"{kind}.attention.key_length") == 8
    assert field(f"{kind}.context_length") == 64
    assert len(field("tokenizer.ggml.tokens")) == VOCABULARY
    assert field("tokenizer.ggml.tokens")[:3] == ["<s>", "</s>", "<pad>"]
    assert field("tokenizer.ggml.bos_token_id") == 0
    assert field("tokenizer.ggml.eos_token_id") == 1


def test_transformers_reads_the_file_as_the_same_model(
    tmp_path: Path, merge: Callable[..., Path]
) -> None:
    """A reader that is not ours; it knows Qwen3-MoE, but no Mixtral, which GGUF calls a Llama."""
    family = build_family(tmp_path, kind="qwen3")
    out = merge(family.recipe(parameters={"num_experts": NUM_EXPERTS}))
    write_gguf(out, out / "model.gguf")
    config = AutoConfig.from_pretrained(out)
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", config=config)
    written = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(read(ids).logits, written(ids).logits)


def test_rotated_rows_are_those_llama_cpp_pairs() -> None:
    """Row r of a head and its partner, half a head further, become neighbours."""
    rows = torch.arange(8).unsqueeze(1)
    assert rope_order(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
