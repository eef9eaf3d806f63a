"""The lines of docs/troubleshooting.md that make a dense model of a GGUF, run on a small one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family, build_family, byte_tokenizer
from tests.support.naive import load_model

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
TEXT = "The capital of France is"


def snippet() -> str:
    section = PAGE.read_text(encoding="utf-8").partition("### GGUF\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def write_gguf(folder: Path, path: Path, quantisation: gguf.GGMLQuantizationType) -> None:
    """A dense model as llama.cpp's converter writes it, its matrices quantised."""
    config = json.loads((folder / "config.json").read_text())
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
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_token_list([*sorted(vocabulary, key=lambda token: vocabulary[token]), "qz"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["q z"])  # there must be one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config["num_hidden_layers"])
    for name, tensor in load_model(folder).items():
        tensor = tensor.float()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # Rows of queries and keys as llama.cpp rotates them: pairs side by side.
            pairs = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2))
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        kept = tensor.dim() < 2
        wanted = gguf.GGMLQuantizationType.F32 if kept else quantisation
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped
        data = gguf.quants.quantize(tensor.contiguous().numpy(), wanted)
        writer.add_tensor(mapped, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_snippet(family: Family, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> Path:
    monkeypatch.chdir(family.root)
    code = snippet()
    assert 'dtype="bfloat16"' in code
    exec(compile(code.replace('"bfloat16"', f'"{dtype}"'), str(PAGE), "exec"), {})
    return family.root / "dense"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_gguf_becomes_the_model_it_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Callable[..., Path]
) -> None:
    # transformers takes this size of a head for every Qwen3's, as it is in all that there are.
    own = {"head_dim": 128, "tie_word_embeddings": True} if kind == "qwen3" else {}
    family = build_family(tmp_path / "family", kind=kind, vocab_size=260, **own)
    (family.root / "downloads").mkdir()
    path = family.root / "downloads" / "model-Q8_0.gguf"
    write_gguf(family.checkpoints[-1], path, gguf.GGMLQuantizationType.F32)
    dense = run_snippet(family, monkeypatch)
    ids = torch.arange(3, 40).unsqueeze(0)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for folder in (family.checkpoints[-1], dense)
    )
    torch.testing.assert_close(after, before)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == (
        byte_tokenizer()(TEXT, add_special_tokens=False).input_ids
    )
    document = family.recipe(models=[str(family.checkpoints[0]), str(dense)])
    assert load_model(merge(document))


def test_a_quantised_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits in blocks of 32: off by half a step, a 254th of the block's largest, and bfloat16."""
    family = build_family(tmp_path / "family", count=0, vocab_size=260, intermediate_size=64)
    (family.root / "downloads").mkdir()
    path = family.root / "downloads" / "model-Q8_0.gguf"
    write_gguf(family.base, path, gguf.GGMLQuantizationType.Q8_0)
    dense = load_model(run_snippet(family, monkeypatch, "bfloat16"))
    for name, tensor in load_model(family.base).items():
        largest = tensor.abs().max().item()
        assert dense[name].dtype == torch.bfloat16
        torch.testing.assert_close(
            dense[name].float(), tensor.float(), atol=largest / 200, rtol=2**-8, msg=name
        )
