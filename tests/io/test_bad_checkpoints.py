"""Broken checkpoints: one sentence that names the thing and the remedy, and nothing left.

`tests/support/spoilt.py` says what a case is. What is made to harm is in `test_hostile_files.py`
and `test_hostile_headers.py`.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Family
from tests.support.spoilt import (
    BASE,
    FIRST,
    LAST,
    QUERY,
    SECOND,
    UP,
    Case,
    Document,
    Malicious,
    assert_case_refused,
    both,
    config,
    content,
    entry,
    other_family,
    parameters,
    pickled,
    recipe,
    sharded,
    weights,
    without,
)


def adapter(family: Family) -> None:
    folder = family.checkpoints[-1]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def adapter_as_base(family: Family) -> Document:
    adapter(family)
    return family.recipe() | {"base_model": str(family.checkpoints[-1])}


FOLDER_CASES = [
    Case(
        "no config.json",
        without(f"{SECOND}/config.json"),
        "Checkpoint sft/checkpoint-1000 has no config.json in sft/checkpoint-1000; give the "
        "folder of a complete Hugging Face checkpoint.",
    ),
    Case(
        "invalid config.json",
        content(f"{SECOND}/config.json", lambda old: old[:-20]),
        "sft/checkpoint-1000/config.json is not valid JSON (…line 31 column 3…); copy or "
        "download it again.",
    ),
    Case(
        "config.json is a list",
        content(f"{SECOND}/config.json", lambda old: b"[]"),
        "sft/checkpoint-1000/config.json is not a JSON object; copy or download it again.",
    ),
    Case(
        "no weights",
        without(f"{LAST}/model.safetensors"),
        "Checkpoint sft/checkpoint-1500 has no weights (model.safetensors or …) in "
        "sft/checkpoint-1500; give the folder of a complete Hugging Face checkpoint.",
    ),
    Case(
        "other architecture",
        config(SECOND, model_type="qwen2"),
        "Checkpoint sft/checkpoint-1000 has model_type 'qwen2'; use llama, mistral "
        "or qwen3 checkpoints.",
    ),
    Case(
        "no model_type",
        config(BASE, model_type=None),
        "Checkpoint base has model_type None; use llama, mistral or qwen3 checkpoints.",
    ),
    Case(
        "Llama and Mistral",
        other_family(LAST, kind="mistral"),
        "Checkpoint sft/checkpoint-1500 is a mistral model, the base base a llama; all must "
        "come from one base.",
    ),
    Case(
        "other hidden size",
        other_family(LAST, hidden_size=64),
        "Checkpoint sft/checkpoint-1500 has hidden_size 64, the base base has 32; all models "
        "must come from the same base.",
    ),
    Case(
        "other number of layers",
        other_family(LAST, num_hidden_layers=3),
        "Checkpoint sft/checkpoint-1500 has num_hidden_layers 3, the base base has 2; all "
        "models must come from the same base.",
    ),
    Case(
        "other vocabulary",
        other_family(LAST, vocab_size=260),
        "Checkpoint sft/checkpoint-1500 has vocab_size 260, the base base has 259; resize "
        "the base's embeddings to the tokenizer the checkpoints were trained with.",
    ),
    Case(
        "other rope",
        config(LAST, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "Checkpoint sft/checkpoint-1500 has rope_parameters {…500000.0…}, the base base has "
        "{…10000.0…}; all models must come from the same base.",
    ),
    Case(
        "attention_bias",
        config(LAST, attention_bias=True),
        "Checkpoint sft/checkpoint-1500 sets attention_bias, which Mixtral cannot express; "
        "use a model without it.",
    ),
    Case(
        "mlp_bias",
        config(LAST, mlp_bias=True),
        "Checkpoint sft/checkpoint-1500 sets mlp_bias, which Mixtral cannot express; use a "
        "model without it.",
    ),
    Case(
        "quantised",
        config(LAST, quantization_config={"bits": 4}),
        "Checkpoint sft/checkpoint-1500 is quantised (quantization_config); use the "
        "unquantised checkpoint.",
    ),
    Case(
        "senseless config.json",
        config(LAST, num_attention_heads="four"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama "
        "configuration (…num_attention_heads…'four'…); copy or download it again.",
    ),
    Case(
        "unknown activation",
        config(LAST, hidden_act="swish-9"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama configuration "
        "(hidden_act 'swish-9' is unknown); copy or download it again.",
    ),
    Case(
        "config.json of another model",
        both(*(config(f, intermediate_size=64) for f in (BASE, FIRST, SECOND, LAST))),
        "The base base should have model.layers.0.mlp.gate_proj.weight of shape [64, 32] by "
        "its config.json but has it in shape [48, 32]; use a complete checkpoint.",
    ),
    Case(
        "adapter as base",
        adapter_as_base,
        "sft/checkpoint-1500 is an adapter, but a complete model is needed here; name the model "
        "the adapter was trained on.",
    ),
    Case(
        "pickle without the option",
        pickled(),
        "Checkpoint sft/checkpoint-1500 has only pytorch_model.bin, a pickle that could run "
        "code; convert it to safetensors, or pass --lazy-unpickle to read it with "
        "weights_only.",
    ),
    Case(
        "malicious pickle",
        pickled(lambda s: s.update(extra=Malicious())),
        "sft/checkpoint-1500/pytorch_model.bin cannot be read with weights_only (it is "
        "corrupt or holds objects other than tensors, which could run code); convert the "
        "checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    Case(
        "truncated pickle",
        both(pickled(), content(f"{LAST}/pytorch_model.bin", lambda old: old[:5000])),
        "sft/checkpoint-1500/pytorch_model.bin is not a file of torch.save (…), or is "
        "truncated; copy or download it again, or convert the checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    Case(
        "missing shard",
        sharded(lambda folder, _: (folder / "part-1.safetensors").unlink()),
        "Checkpoint sft/checkpoint-1500 lacks the shard part-1.safetensors that its "
        "model.safetensors.index.json lists; copy or download it again.",
    ),
    Case(
        "index points outside",
        sharded(lambda _, m: m.update({UP: "../checkpoint-500/model.safetensors"})),
        "sft/checkpoint-1500/model.safetensors.index.json points outside its folder "
        "(../checkpoint-500/model.safetensors); do not use this checkpoint.",
    ),
    Case(
        "index lists too much",
        sharded(lambda _, m: m.update(extra="part-0.safetensors")),
        "Checkpoint sft/checkpoint-1500 lacks extra that its model.safetensors.index.json "
        "lists; copy or download it again.",
    ),
    Case(
        "index without weight_map",
        sharded(lambda folder, m: m.update({UP: 3})),
        "sft/checkpoint-1500/model.safetensors.index.json has no usable weight_map; copy or "
        "download it again.",
    ),
]

WEIGHT_CASES = [
    Case(
        "truncated safetensors",
        content(f"{SECOND}/model.safetensors", lambda old: old[:-100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…not fully covered); "
        "copy or download it again.",
    ),
    Case(
        "cut to its header",
        content(f"{SECOND}/model.safetensors", lambda old: old[:100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    Case(
        "garbage safetensors",
        content(f"{BASE}/model.safetensors", lambda old: b"garbage" * 99),
        "base/model.safetensors is truncated or corrupt (…header…); copy or download it again.",
    ),
    Case(
        "empty safetensors",
        content(f"{LAST}/model.safetensors", lambda old: b""),
        "sft/checkpoint-1500/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    Case(
        "missing tensor",
        weights(SECOND, lambda t: t.pop(UP)),
        "Checkpoint sft/checkpoint-1000 has no tensor model.layers.1.mlp.up_proj.weight; use "
        "a complete llama checkpoint.",
    ),
    Case(
        "missing tensor in the base",
        weights(BASE, lambda t: t.pop(UP)),
        "The base base should have model.layers.1.mlp.up_proj.weight of shape [48, 32] by "
        "its config.json but lacks it; use a complete checkpoint.",
    ),
    Case(
        "other shape",
        weights(SECOND, lambda t: t.update({UP: t[UP][1:].clone()})),
        "Checkpoint sft/checkpoint-1000 has model.layers.1.mlp.up_proj.weight of shape [47, "
        "32], the base base has [48, 32]; all models must come from the same base.",
    ),
    Case(
        "other vocabulary in the weights",
        weights(SECOND, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 32)})),
        "Checkpoint sft/checkpoint-1000 has a vocabulary of 300 in "
        "model.embed_tokens.weight, the base base one of 259; resize the base's embeddings "
        "to the tokenizer the checkpoints were trained with.",
    ),
    *(
        # Their first dimension is not a vocabulary, or is not what differs.
        Case(
            f"embedding of shape {shape}",
            weights(
                LAST,
                lambda t, shape=shape: t.update({"model.embed_tokens.weight": torch.zeros(shape)}),
            ),
            f"Checkpoint {LAST} has model.embed_tokens.weight of shape {list(shape)}, the base base "
            "has [259, 32]; …",
        )
        for shape in ((), (259,), (259, 31), (259, 32, 1))
    ),
    Case(
        "a tensor without values in a pickle",
        pickled(lambda s: s.update({UP: s[UP].to("meta")})),
        f"{LAST}/pytorch_model.bin stores {UP} in a form that cannot be merged; …",
        ("--lazy-unpickle",),
    ),
    Case(
        "bias tensors",
        weights(SECOND, lambda t: t.update({QUERY.replace("weight", "bias"): torch.zeros(32)})),
        "Checkpoint sft/checkpoint-1000 has the tensor model.layers.0.self_attn.q_proj.bias, "
        "which Mixtral has no place for; use a plain checkpoint without biases or "
        "adapters.",
    ),
    Case(
        "int8 tensors",
        weights(SECOND, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        "sft/checkpoint-1000/model.safetensors stores model.layers.1.mlp.up_proj.weight as "
        "I8, which cannot be merged; use the unquantised checkpoint (…).",
    ),
    Case(
        "NaN in an FFN",
        entry(SECOND, UP, float("nan")),
        "Checkpoint sft/checkpoint-1000 has NaN or infinite weights in "
        "model.layers.1.mlp.up_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    Case(
        "NaN in the base",
        entry(BASE, UP, float("nan")),
        "Checkpoint base has NaN or infinite weights in model.layers.1.mlp.up_proj.weight; use …",
    ),
    Case(
        "infinity in the backbone",
        entry(LAST, QUERY, float("inf")),
        "Checkpoint sft/checkpoint-1500 has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    Case(
        "NaN in an averaged backbone",
        both(entry(FIRST, QUERY, float("nan")), parameters(backbone="average")),
        "Checkpoint sft/checkpoint-500… has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use …",
    ),
    Case(
        "float16 overflow",
        both(entry(SECOND, UP, 1e5), recipe(dtype="float16")),
        f"Expert 1's {UP} overflows float16; set dtype: bfloat16.",
    ),
    Case(
        "float16 overflow in the backbone",
        both(entry(LAST, QUERY, 1e5), recipe(dtype="float16")),
        f"The backbone's {QUERY} overflows float16; set dtype: bfloat16.",
    ),
]

CASES = [*FOLDER_CASES, *WEIGHT_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


@pytest.mark.parametrize("case", [case for case in CASES if case.options], ids=str)
def test_options_of_mergekit(case: Case, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads itself is the recipe and the options: from there on the run is the same."""
    assert_case_refused(case, family, monkeypatch, command="mergekit-yaml")
