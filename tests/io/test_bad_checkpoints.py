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
    each,
    entry,
    other_family,
    parameters,
    pickled,
    recipe,
    sharded,
    weights,
    without,
)

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def adapter(family: Family) -> None:
    folder = family.checkpoints[-1]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def adapter_as_base(family: Family) -> Document:
    adapter(family)
    return family.recipe() | {"base_model": str(family.checkpoints[-1])}


FOLDER_CASES = {
    "no config.json": Case(
        without(f"{SECOND}/config.json"),
        "Checkpoint sft/checkpoint-1000 has no config.json in sft/checkpoint-1000; give the "
        "folder of a complete Hugging Face checkpoint.",
    ),
    "invalid config.json": Case(
        content(f"{SECOND}/config.json", lambda old: old[:-20]),
        "sft/checkpoint-1000/config.json is not valid JSON (…line 31 column 3…); copy or "
        "download it again.",
    ),
    "config.json is a list": Case(
        content(f"{SECOND}/config.json", lambda old: b"[]"),
        "sft/checkpoint-1000/config.json is not a JSON object; copy or download it again.",
    ),
    "no weights": Case(
        without(f"{LAST}/model.safetensors"),
        "Checkpoint sft/checkpoint-1500 has no weights (model.safetensors or …) in "
        "sft/checkpoint-1500; give the folder of a complete Hugging Face checkpoint.",
    ),
    "other architecture": Case(
        config(SECOND, model_type="mamba"),
        "Checkpoint sft/checkpoint-1000 has model_type 'mamba'; use llama, mistral, … or … "
        "checkpoints.",
    ),
    "no model_type": Case(
        config(BASE, model_type=None),
        "Checkpoint base has model_type None; use llama, mistral, … or … checkpoints.",
    ),
    "Llama and Mistral": Case(
        other_family(LAST, kind="mistral"),
        "Checkpoint sft/checkpoint-1500 is a mistral model, the base base a llama; all must "
        "come from one base.",
    ),
    "other hidden size": Case(
        other_family(LAST, hidden_size=64),
        "Checkpoint sft/checkpoint-1500 has hidden_size 64, the base base has 32; all models "
        "must come from the same base.",
    ),
    "other number of layers": Case(
        other_family(LAST, num_hidden_layers=3),
        "Checkpoint sft/checkpoint-1500 has num_hidden_layers 3, the base base has 2; all "
        "models must come from the same base.",
    ),
    "other vocabulary": Case(
        other_family(LAST, vocab_size=260),
        "Checkpoint sft/checkpoint-500 has vocab_size 259, sft/checkpoint-1500, which the backbone "
        "comes from, has 260; resize the embeddings of those that have fewer.",
    ),
    "other vocabulary than a base that is used": Case(
        both(other_family(BASE, vocab_size=260), parameters(backbone="base")),
        "Checkpoint sft/checkpoint-500 has vocab_size 259, the base base has 260; take the "
        "backbone from a checkpoint (leave out backbone: base).",
    ),
    "other rope": Case(
        config(LAST, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "Checkpoint sft/checkpoint-500 has rope_parameters {…10000.0…}, sft/checkpoint-1500, which "
        "the backbone comes from, has {…500000.0…}; all checkpoints must come from the same run.",
    ),
    "other rope than a base that is used": Case(
        both(
            config(BASE, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            parameters(backbone="base"),
        ),
        "Checkpoint sft/checkpoint-500 has rope_parameters {…10000.0…}, the base base has "
        "{…500000.0…}; take the backbone from a checkpoint (leave out backbone: base).",
    ),
    "other scaling of the rope": Case(
        config(LAST, rope_parameters=LINEAR_ROPE | {"type": "linear"}),
        "Checkpoint sft/checkpoint-500 has rope_parameters {…10000.0…}, sft/checkpoint-1500, which "
        "the backbone comes from, has {…'factor': 2.0…}; all checkpoints must come from the same "
        "run.",
    ),
    "other eps": Case(
        config(LAST, rms_norm_eps=1.00001e-6),
        "Checkpoint sft/checkpoint-1500 has rms_norm_eps 1.00001e-06, the base base has 1e-06; all "
        "models must come from the same base.",
    ),
    "other activation": Case(
        config(LAST, hidden_act="gelu"),
        "Checkpoint sft/checkpoint-1500 has hidden_act gelu, the base base has silu; all models "
        "must come from the same base.",
    ),
    "attention_bias": Case(
        config(LAST, attention_bias=True),
        "Checkpoint sft/checkpoint-1500 has attention_bias True, the base base has False; all "
        "models must come from the same base.",
    ),
    "mlp_bias": Case(
        config(LAST, mlp_bias=True),
        "Checkpoint sft/checkpoint-1500 has mlp_bias True, the base base has False; all models "
        "must come from the same base.",
    ),
    "quantised": Case(
        config(LAST, quantization_config={"bits": 4}),
        "Checkpoint sft/checkpoint-1500 is quantised (quantization_config); use the "
        "unquantised checkpoint.",
    ),
    "senseless config.json": Case(
        config(LAST, num_attention_heads="four"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama "
        "configuration (…num_attention_heads…'four'…); copy or download it again.",
    ),
    "unknown activation": Case(
        config(LAST, hidden_act="swish-9"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama configuration "
        "(hidden_act 'swish-9' is unknown); copy or download it again.",
    ),
    "config.json of another model": Case(
        both(*(config(f, intermediate_size=64) for f in (BASE, FIRST, SECOND, LAST))),
        "The base base should have model.layers.0.mlp.gate_proj.weight of shape [64, 32] by "
        "its config.json but has it in shape [48, 32]; use a complete checkpoint.",
    ),
    "adapter as base": Case(
        adapter_as_base,
        "sft/checkpoint-1500 is an adapter, but a complete model is needed here; name the model "
        "the adapter was trained on.",
    ),
    "pickle without the option": Case(
        pickled(),
        "Checkpoint sft/checkpoint-1500 has only pytorch_model.bin, a pickle that could run "
        "code; convert it to safetensors, or pass --lazy-unpickle to read it with "
        "weights_only.",
    ),
    "malicious pickle": Case(
        pickled(lambda s: s.update(extra=Malicious())),
        "sft/checkpoint-1500/pytorch_model.bin cannot be read with weights_only (it is "
        "corrupt or holds objects other than tensors, which could run code); convert the "
        "checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    "truncated pickle": Case(
        both(pickled(), content(f"{LAST}/pytorch_model.bin", lambda old: old[:5000])),
        "sft/checkpoint-1500/pytorch_model.bin is not a file of torch.save (…), or is "
        "truncated; copy or download it again, or convert the checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    "missing shard": Case(
        sharded(lambda folder, _: (folder / "part-1.safetensors").unlink()),
        "Checkpoint sft/checkpoint-1500 lacks the shard part-1.safetensors that its "
        "model.safetensors.index.json lists; copy or download it again.",
    ),
    "index points outside": Case(
        sharded(lambda _, m: m.update({UP: "../checkpoint-500/model.safetensors"})),
        "sft/checkpoint-1500/model.safetensors.index.json points outside its folder "
        "(../checkpoint-500/model.safetensors); do not use this checkpoint.",
    ),
    "index lists too much": Case(
        sharded(lambda _, m: m.update(extra="part-0.safetensors")),
        "Checkpoint sft/checkpoint-1500 lacks extra that its model.safetensors.index.json "
        "lists; copy or download it again.",
    ),
    "index without weight_map": Case(
        sharded(lambda folder, m: m.update({UP: 3})),
        "sft/checkpoint-1500/model.safetensors.index.json has no usable weight_map; copy or "
        "download it again.",
    ),
}

WEIGHT_CASES = {
    "truncated safetensors": Case(
        content(f"{SECOND}/model.safetensors", lambda old: old[:-100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…not fully covered); "
        "copy or download it again.",
    ),
    "cut to its header": Case(
        content(f"{SECOND}/model.safetensors", lambda old: old[:100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    "garbage safetensors": Case(
        content(f"{BASE}/model.safetensors", lambda old: b"garbage" * 99),
        "base/model.safetensors is truncated or corrupt (…header…); copy or download it again.",
    ),
    "empty safetensors": Case(
        content(f"{LAST}/model.safetensors", lambda old: b""),
        "sft/checkpoint-1500/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    "missing tensor": Case(
        weights(SECOND, lambda t: t.pop(UP)),
        "Checkpoint sft/checkpoint-1000 should have model.layers.1.mlp.up_proj.weight of shape "
        "[48, 32] by its config.json but lacks it; use a complete checkpoint.",
    ),
    "missing tensor in the base": Case(
        weights(BASE, lambda t: t.pop(UP)),
        "The base base should have model.layers.1.mlp.up_proj.weight of shape [48, 32] by "
        "its config.json but lacks it; use a complete checkpoint.",
    ),
    "other shape": Case(
        weights(SECOND, lambda t: t.update({UP: t[UP][1:].clone()})),
        "Checkpoint sft/checkpoint-1000 should have model.layers.1.mlp.up_proj.weight of shape "
        "[48, 32] by its config.json but has it in shape [47, 32]; use a complete checkpoint.",
    ),
    "other vocabulary in the weights": Case(
        weights(SECOND, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 32)})),
        "Checkpoint sft/checkpoint-1000 should have model.embed_tokens.weight of shape [259, 32] "
        "by its config.json but has it in shape [300, 32]; use a complete checkpoint.",
    ),
    **{
        f"embedding of shape {shape}": Case(
            weights(
                LAST,
                lambda t, shape=shape: t.update({"model.embed_tokens.weight": torch.zeros(shape)}),
            ),
            f"Checkpoint {LAST} should have model.embed_tokens.weight of shape [259, 32] by its "
            f"config.json but has it in shape {list(shape)}; use a complete checkpoint.",
        )
        for shape in ((), (259,), (259, 31), (259, 32, 1))
    },
    "a tensor without values in a pickle": Case(
        pickled(lambda s: s.update({UP: s[UP].to("meta")})),
        f"{LAST}/pytorch_model.bin stores {UP} in a form that cannot be merged; …",
        ("--lazy-unpickle",),
    ),
    "bias tensors": Case(
        weights(SECOND, lambda t: t.update({QUERY.replace("weight", "bias"): torch.zeros(32)})),
        "Checkpoint sft/checkpoint-1000 has the tensor model.layers.0.self_attn.q_proj.bias, "
        "which Mixtral has no place for; use a plain checkpoint without biases or "
        "adapters.",
    ),
    "int8 tensors": Case(
        weights(SECOND, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        "sft/checkpoint-1000/model.safetensors stores model.layers.1.mlp.up_proj.weight as "
        "I8, which cannot be merged; use the unquantised checkpoint (…).",
    ),
    "NaN in an FFN": Case(
        entry(SECOND, UP, float("nan")),
        "Checkpoint sft/checkpoint-1000 has NaN or infinite weights in "
        "model.layers.1.mlp.up_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    "NaN in the base": Case(
        entry(BASE, UP, float("nan")),
        "Checkpoint base has NaN or infinite weights in model.layers.1.mlp.up_proj.weight; use …",
    ),
    "infinity in the backbone": Case(
        entry(LAST, QUERY, float("inf")),
        "Checkpoint sft/checkpoint-1500 has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    "NaN in an averaged backbone": Case(
        both(entry(FIRST, QUERY, float("nan")), parameters(backbone="average")),
        "Checkpoint sft/checkpoint-500… has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use …",
    ),
    "float16 overflow": Case(
        both(entry(SECOND, UP, 1e5), recipe(dtype="float16")),
        f"Expert 1's {UP} overflows float16; set dtype: bfloat16.",
    ),
    "float16 overflow in the backbone": Case(
        both(entry(LAST, QUERY, 1e5), recipe(dtype="float16")),
        f"The backbone's {QUERY} overflows float16; set dtype: bfloat16.",
    ),
}

CASES = FOLDER_CASES | WEIGHT_CASES


@each(CASES)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


@each({name: case for name, case in CASES.items() if case.options})
def test_options_of_mergekit(case: Case, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads itself is the recipe and the options: from there on the run is the same."""
    assert_case_refused(case, family, monkeypatch, command="mergekit-yaml")
