"""The folder as others see it: transformers loads it whole, and it computes what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from tests.conftest import LLAMA3_ROPE, VOCABULARY, Family, build_family, byte_tokenizer
from tests.support.loading import load
from tests.support.naive import load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no grouped queries": {"num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "explicit head_dim": {"head_dim": 12},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "sharded input": {"shard_size": "30KB"},
    "mistral": {"kind": "mistral", "sliding_window": None},
    "mistral sliding window": {"kind": "mistral", "sliding_window": 5},
    "qwen3": {"kind": "qwen3"},
    "qwen3 tied": {"kind": "qwen3", "tie_word_embeddings": True, "head_dim": 12},
    "one layer": {"num_hidden_layers": 1},
    "odd eps and activation": {"rms_norm_eps": 1e-3, "hidden_act": "gelu"},
}


def with_identical_checkpoints(family: Family, count: int) -> list[str]:
    """Copies of the first checkpoint; returns their folders."""
    folders = []
    for index in range(count):
        folder = family.root / f"copy-{index}"
        shutil.copytree(family.checkpoints[0], folder)
        folders.append(str(folder))
    return folders


@torch.no_grad()
def logits(model: Any, length: int = 24) -> torch.Tensor:
    ids = torch.arange(3, 3 + 2 * length).view(2, length) % VOCABULARY
    return model(ids).logits.float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_checkpoints_make_the_dense_model(tmp_path, merge, variant: str) -> None:
    family = build_family(tmp_path, count=1, **VARIANTS[variant])
    models = with_identical_checkpoints(family, 3)
    out = merge(family.recipe(models=models))
    moe, dense = load(out), load(family.checkpoints[0])
    assert moe.config.num_local_experts == 3
    assert moe.config.model_type == ("qwen3_moe" if "qwen3" in variant else "mixtral")
    assert moe.config.tie_word_embeddings == dense.config.tie_word_embeddings
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=1e-5)


def test_any_gate_will_do_for_identical_experts(family, merge) -> None:
    out = merge(family.recipe(models=with_identical_checkpoints(family, 4)))
    moe, dense = load(out), load(family.checkpoints[0])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for layer in moe.model.layers:
            gate = torch.randn(layer.mlp.gate.weight.shape, generator=generator) * 10**seed
            layer.mlp.gate.weight.data.copy_(gate)
        torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=1e-5)


def test_one_checkpoint_makes_an_moe_of_one(family, merge) -> None:
    out = merge(family.recipe(models=[str(family.checkpoints[0])]))
    moe = load(out)
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (1, 1)
    torch.testing.assert_close(logits(moe), logits(load(family.checkpoints[0])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama", "tied embeddings", "mistral sliding window", "qwen3"])
def test_expanded_output_loads_and_generates(tmp_path, merge, variant: str, dtype: str) -> None:
    family = build_family(tmp_path, count=2, dtype=getattr(torch, dtype), **VARIANTS[variant])
    out = merge(family.recipe(parameters={"num_experts": 4}), max_shard_bytes=60_000)
    model = load(out, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    assert logits(model).isfinite().all()


def test_output_dtype_can_be_chosen(shared_family, merge) -> None:
    half = merge(shared_family.recipe(dtype="float32", out_dtype="bfloat16"), "half")
    assert {t.dtype for t in load_model(half).values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_names_are_those_of_published_mixtrals(shared_family, merge) -> None:
    """What llama.cpp's converter, vLLM and transformers 4 look for, and nothing else."""
    names = set(load_model(merge(shared_family.recipe(parameters={"num_experts": 4}))))
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        expected |= {f"{prefix}.self_attn.{p}_proj.weight" for p in "qkvo"}
        expected |= {f"{prefix}.{n}_layernorm.weight" for n in ("input", "post_attention")}
        expected.add(f"{prefix}.block_sparse_moe.gate.weight")
        expected |= {
            f"{prefix}.block_sparse_moe.experts.{e}.w{w}.weight"
            for e in range(4)
            for w in (1, 2, 3)
        }
    assert names == expected


def test_config_speaks_to_old_and_new_readers(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=2, rope_parameters=LLAMA3_ROPE)
    config = json.loads((merge(family.recipe()) / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    assert "rope_parameters" not in config
    assert MixtralConfig.from_dict(config).rope_parameters == LLAMA3_ROPE


def test_gates_have_a_file_of_their_own_when_there_are_several(shared_family, merge) -> None:
    out = merge(shared_family.recipe(), max_shard_bytes=50_000)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    gates = {file for name, file in weight_map.items() if name.endswith("moe.gate.weight")}
    others = {file for name, file in weight_map.items() if not name.endswith("moe.gate.weight")}
    assert len(gates) == 1
    assert not gates & others


def test_folder_has_all_a_model_page_needs(family, merge) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(family.checkpoints[-1])
    (family.base / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Base\n")
    document = family.recipe(
        parameters={"num_experts": 5}, router={"data": str(family.seed_file())}
    )
    out = merge(document)
    report = json.loads((out / "upit_report.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == report["files"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} < set(
        report["files"]
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    assert yaml.safe_load((out / "mergekit_config.yml").read_text()) == document
    card = (out / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert {"mergekit", "merge", "moe", "upit"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # local folders are not models of the Hub
    assert str(family.base.parent) not in card.split("```yaml")[0]
    assert len(report["lineage"]["experts"]) == 5
    assert report["seed"] == 0
    assert set(report["versions"]) >= {"upit-merge", "mergekit", "torch", "transformers"}
    assert sum(e["samples"] for e in report["router"]["buckets"]["experts"]) == 24
    assert set(report["seconds"]) == {
        "similarity",
        "experts",
        "router",
    }  # two passes, as it has children


def test_chat_template_by_name_or_text(shared_family, merge) -> None:
    named = merge(shared_family.recipe(chat_template="chatml"), "named")
    assert "im_start" in AutoTokenizer.from_pretrained(named).chat_template
    text = "{{ messages[0].content }}"
    given = merge(shared_family.recipe(chat_template=text), "given")
    assert AutoTokenizer.from_pretrained(given).chat_template == text
    assert json.loads((given / "tokenizer_config.json").read_text())["chat_template"] == text


def test_tokenizer_comes_from_the_last_checkpoint_or_where_told(family, merge) -> None:
    (family.base / "added_tokens.json").write_text('{"from": 1}')
    assert not (merge(family.recipe(), "a") / "added_tokens.json").exists()
    assert (merge(family.recipe(tokenizer_source="base"), "b") / "added_tokens.json").exists()
    without = merge(family.recipe(), "c", copy_tokenizer=False)
    assert not (without / "tokenizer.json").exists()


def test_no_card_when_not_wanted(shared_family, merge) -> None:
    out = merge(shared_family.recipe(), write_card=False)
    assert not (out / "README.md").exists()
    assert not (out / "mergekit_config.yml").exists()
    assert (out / "upit_report.json").exists()


def test_special_tokens_come_with_the_tokenizer(family, merge) -> None:
    """A chat model must stop where its tokenizer ends a turn, whatever the backbone is."""
    last = family.checkpoints[-1]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((last / name).read_text())
        (last / name).write_text(json.dumps(content | {"eos_token_id": 7}))

    def ends(out: Path) -> list[int]:
        files = ("config.json", "generation_config.json")
        return [json.loads((out / name).read_text())["eos_token_id"] for name in files]

    assert ends(merge(family.recipe(parameters={"backbone": "base"}), "a")) == [7, 7]
    assert ends(merge(family.recipe(tokenizer_source="base"), "b")) == [1, 1]


def test_default_dtype_ignores_what_is_not_copied(tmp_path, merge) -> None:
    """Old Llama checkpoints carry rotary tables in float32 beside bfloat16 weights."""
    family = build_family(tmp_path, count=2, dtype=torch.bfloat16)
    path = family.base / "model.safetensors"
    tensors = load_model(family.base)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, metadata={"format": "pt"})
    out = merge(family.recipe())
    assert {t.dtype for t in load_model(out).values()} == {torch.bfloat16}


def test_other_dtypes_than_the_base_are_told(tmp_path, merge, caplog) -> None:
    family = build_family(tmp_path, count=2)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    model.to(torch.bfloat16).save_pretrained(family.base)
    out = merge(family.recipe(), "told")
    assert {t.dtype for t in load_model(out).values()} == {torch.bfloat16}
    assert "is stored in float32, the base in bfloat16" in caplog.text
    caplog.clear()
    merge(family.recipe(dtype="float32"), "chosen")
    assert "is stored in" not in caplog.text


def test_an_odd_card_of_the_base_does_no_harm(family, merge) -> None:
    (family.base / "README.md").write_text("---\nlicense: mit\ndate: 2024-02-30\n---\n")
    assert (merge(family.recipe()) / "README.md").is_file()


def test_output_beside_the_checkpoints_is_not_taken_for_one(family, merge, monkeypatch) -> None:
    monkeypatch.chdir(family.root)
    out = family.root / "sft" / "checkpoint-moe"
    merge(family.recipe(models=["sft/checkpoint-*"]), out)
    assert load(out).config.num_local_experts == 3


def test_tokenizer_larger_than_the_vocabulary_is_told(family, merge, caplog) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(family.checkpoints[-1])
    merge(family.recipe())
    assert "has token ids up to 259, but the models have only 259 embeddings" in caplog.text


def test_yarn_is_carried_over_without_a_warning(tmp_path, merge, caplog) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    family = build_family(tmp_path, count=2, rope_parameters=rope)
    caplog.clear()
    config = load(merge(family.recipe())).config
    assert {k: config.rope_parameters[k] for k in rope} == rope
    assert "factor" not in caplog.text


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({}, "(`one_vs_rest`), each assigned to an expert by its perplexity."),
        ({"assign": "shuffled", "objective": "ridge"}, "(`ridge`), each assigned to an expert at"),
        ({"objective": "random"}, "The gates are random."),
        (
            {"objective": "upit", "upit": {"train_experts": True, "epochs": 1}},
            "Every expert was trained together with its routing vectors on its own part of 24 seed",
        ),
        (
            {"refine": {"steps": 2, "tokens": 100}},
            "Then the gates were trained for 2 steps on the loss of the whole mixture.",
        ),
        ({"assign": {"column": "expert"}}, "each assigned to an expert by its `expert`."),
    ],
    ids=str,
)
def test_the_card_says_what_the_gates_are(shared_family, tmp_path, merge, router, words) -> None:
    data = tmp_path / "seed.jsonl"
    rows = [{"text": f"sample {i} of many", "expert": i % 3} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = merge(shared_family.recipe(router={"data": str(data), **router}))
    assert words in (out / "README.md").read_text()
    report = json.loads((out / "upit_report.json").read_text())["router"]
    if "assign" in router and isinstance(router["assign"], dict):
        assert [row["samples"] for row in report["buckets"]["experts"]] == [8, 8, 8]
        assert report["buckets"]["experts"][0]["loss_all"] is None
    if "buckets" in report and router.get("assign") is None:
        assert "verdict" in report["buckets"]["worth"]
