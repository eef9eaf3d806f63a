"""What other trainers leave: its remedy by name, and what needs none is read as what it is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.conftest import Family
from tests.support.lora import adapters, with_adapters
from tests.support.naive import load_model, unlike
from tests.support.spoilt import (
    FIRST,
    LAST,
    Case,
    Document,
    Spoil,
    assert_case_refused,
    assert_sentence,
    both,
    config,
    each,
    recipe,
    refusal,
    renamed,
    tensors,
    weights,
)
from upit_merge.io.hub import OpenOptions, resolve
from upit_merge.models.lora.config import AdapterConfig, check_adapter_base

NORM = "model.norm.weight"
BESIDE = "put config.json and tokenizer of the model it was trained from beside them"


# ---- folders as the tools leave them -------------------------------------------------------


def leaves(*names: str, folder: str = LAST) -> Spoil:
    """Put other files in the place of a checkpoint's weights; a name that ends in / is a folder."""

    def spoil(family: Family) -> None:
        home = family.root / folder
        (home / "model.safetensors").unlink()
        for name in names:
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.touch()

    return spoil


def fsdp(folder: Path, shards: Path) -> None:
    """What accelerate's `save_state` leaves under SHARDED_STATE_DICT; no config.json among it."""
    model = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    shards.mkdir(parents=True)
    dcp.save({"model": model}, checkpoint_id=shards, no_dist=True)


def ungathered(stored: dict[str, torch.Tensor]) -> None:
    """`save_pretrained` under ZeRO-3: small tensors are whole, others are elsewhere."""
    for name, tensor in stored.items():
        if tensor.dim() == 2:
            stored[name] = torch.zeros(0)


def beside(folder: str, name: str) -> Spoil:
    def spoil(family: Family) -> None:
        (family.root / folder / name).touch()

    return spoil


def mlx(family: Family) -> None:
    """What `mlx_lm.lora` leaves."""
    folder = family.root / LAST
    shutil.rmtree(folder)
    folder.mkdir()
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"num_layers": 16}))
    factors = {"model.layers.1.mlp.up_proj.lora_a": torch.zeros(32, 8)}
    save_file(factors, folder / "adapters.safetensors")
    save_file(factors, folder / "0000100_adapters.safetensors")


def moved_down(name: str) -> Spoil:
    """A checkpoint one folder further down, as where a trainer has several models or adapters."""

    def spoil(family: Family) -> None:
        (family.root / LAST).rename(family.root / "policy")
        (family.root / LAST).mkdir()
        (family.root / "policy").rename(family.root / LAST / name)

    return spoil


def adapter_down(family: Family) -> None:
    with_adapters(family, count=1)
    shutil.rmtree(family.root / LAST)
    (family.root / LAST).mkdir()
    (family.root / "lora" / "checkpoint-500").rename(family.root / LAST / "adapter")


def ungathered_adapters(family: Family) -> Document:
    with_adapters(family, count=1)
    tensors("lora/checkpoint-500/adapter_model.safetensors", ungathered)(family)
    return adapters(family)


def gguf_file(family: Family) -> Document:
    (family.root / "small.gguf").write_bytes(b"GGUF")
    return family.recipe(models=[str(family.root / "small.gguf")])


def gguf_glob(family: Family) -> Document:
    return gguf_file(family) | {"models": [{"model": str(family.root / "*.gguf")}]}


def as_base(folder: str) -> Spoil:
    return lambda family: family.recipe() | {"base_model": str(family.root / folder)}


def adapters_parent(family: Family) -> Document:
    with_adapters(family, count=2)
    return family.recipe(models=[f"{family.base}+{family.root / 'lora'}"])


GGUF = (
    "is a GGUF, made to be run and not to be merged; write it out as a dense model first, as "
    "docs/troubleshooting.md shows under GGUF."
)
OF_RUN = "has no weights itself, but checkpoints of a run;"
OR_ALL = (
    "name one of them, such as {0}/checkpoint-1000, or in a recipe all of them by {0}/checkpoint-*."
)
BITSANDBYTES = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}

CASES = {
    "FSDP, with config.json": Case(
        leaves("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
        f"The checkpoint {LAST} has its weights in shards of FSDP; join them by `accelerate "
        f"merge-weights {LAST}/pytorch_model_fsdp_0 {LAST}`, and {BESIDE}.",
    ),
    "FSDP's own folder": Case(
        lambda family: fsdp(family.root / LAST, family.root / LAST),
        f"The checkpoint {LAST} holds shards of FSDP ({LAST}/__0_0.distcp); join them by "
        f"`accelerate merge-weights {LAST} OUT`, {BESIDE}, and give OUT.",
    ),
    "FSDP in one pickle": Case(
        leaves("pytorch_model_fsdp.bin"),
        f"The checkpoint {LAST} has its weights in {LAST}/pytorch_model_fsdp.bin, FSDP's name for "
        "them; rename it to pytorch_model.bin and pass --lazy-unpickle.",
    ),
    "ZeRO-3 in shards": Case(
        leaves(
            "zero_to_fp32.py",
            "latest",
            "global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt",
            "global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
        f"The checkpoint {LAST} has its weights in DeepSpeed's shards; join them by "
        f"DeepSpeed's own zero_to_fp32.py: `python -m deepspeed.utils.zero_to_fp32 {LAST} {LAST} "
        "--safe_serialization`.",
    ),
    "ZeRO-3 not gathered": Case(
        weights(LAST, ungathered),
        f"Checkpoint {LAST} has … without values, as DeepSpeed ZeRO-3 saves what it has not "
        "gathered; save it again with stage3_gather_16bit_weights_on_model_save: true.",
    ),
    "ZeRO-3 not gathered, with its shards": Case(
        both(weights(LAST, ungathered), beside(LAST, "zero_to_fp32.py")),
        f"Checkpoint {LAST} has … without values, as DeepSpeed ZeRO-3 saves what it has not "
        f"gathered; run DeepSpeed's own `python -m deepspeed.utils.zero_to_fp32 {LAST} OUT "
        "--safe_serialization`, and give OUT with the other files of this folder.",
    ),
    "DeepSpeed's own folder": Case(
        leaves("mp_rank_00_model_states.pt"),
        f"The checkpoint {LAST} has its weights as DeepSpeed keeps them "
        f"({LAST}/mp_rank_00_model_states.pt); join them by DeepSpeed's "
        "zero_to_fp32.py, or save the model again with save_pretrained.",
    ),
    "Megatron": Case(
        leaves("common.pt", "metadata.json", ".metadata", "__0_0.distcp"),
        f"The checkpoint {LAST} is a checkpoint of Megatron or NeMo ({LAST}/common.pt); export it "
        "to Hugging Face's format, with Megatron Bridge (AutoBridge.export_ckpt) or NeMo "
        "(llm.export_ckpt).",
    ),
    "NeMo": Case(
        leaves("weights/common.pt", "weights/__0_0.distcp", "context/model.yaml"),
        f"The checkpoint {LAST} is a checkpoint of Megatron or NeMo ({LAST}/weights/common.pt); …",
    ),
    "mlx": Case(
        mlx,
        f"The checkpoint {LAST} is an adapter of mlx ({LAST}/adapters.safetensors); merge it into "
        f"its base by `mlx_lm.fuse --model BASE --adapter-path {LAST} --save-path OUT "
        "--dequantize` and give OUT.",
    ),
    "Mistral's own form": Case(
        leaves("consolidated.safetensors", "params.json", "tekken.json"),
        f"The checkpoint {LAST} has its weights in {LAST}/consolidated.safetensors, the form of "
        "Mistral's and Meta's own programs; take the model*.safetensors of the same model, or …",
    ),
    "a folder of GGUF": Case(leaves("model-Q4_K_M.gguf"), f"The checkpoint {LAST} {GGUF}"),
    "a GGUF file": Case(gguf_file, f"The checkpoint small.gguf {GGUF}"),
    "GGUF files by a glob": Case(gguf_glob, f"The checkpoint small.gguf {GGUF}"),
    "a model one folder down": Case(
        moved_down("policy"),
        f"The checkpoint {LAST} has no weights itself, but there is a model in it; write "
        f"{LAST}/policy.",
    ),
    "an adapter one folder down": Case(
        adapter_down,
        f"The checkpoint {LAST} has no weights itself, but there is a model in it; write "
        f"{LAST}/adapter.",
    ),
    "a folder whose name is not for terminals": Case(
        moved_down("po{role}\x1b[1m"),
        f"The checkpoint {LAST} has no weights itself, but there is a model in it; write "
        f"{LAST}/po{{role}}\\x1b[1m.",
    ),
    "an adapter that ZeRO-3 has not gathered": Case(
        ungathered_adapters,
        "Checkpoint lora/checkpoint-500 has …lora_A.weight without values, as DeepSpeed ZeRO-3 "
        "saves what it has not gathered; save it again with "
        "stage3_gather_16bit_weights_on_model_save: true.",
    ),
    "a run": Case(
        recipe(models=[{"model": "@sft"}]), f"The checkpoint sft {OF_RUN} {OR_ALL.format('sft')}"
    ),
    "a run with a slash": Case(
        recipe(models=[{"model": "@sft/"}]), f"The checkpoint sft {OF_RUN} {OR_ALL.format('sft')}"
    ),
    "a run of adapters": Case(
        adapters_parent, f"The adapter lora {OF_RUN} {OR_ALL.format('lora')}"
    ),
    "a run as base": Case(
        as_base("sft"),
        f"The base_model sft {OF_RUN} name one of them, such as sft/checkpoint-1000.",
    ),
    "bitsandbytes": Case(
        config(LAST, **BITSANDBYTES),
        f"Checkpoint {LAST} is quantised by bitsandbytes; give the 16-bit model it was made from.",
    ),
    "a 4-bit model of Unsloth's as base": Case(
        recipe(base_model="unsloth/Llama-3.2-1B-unsloth-bnb-4bit"),
        "The base_model unsloth/Llama-3.2-1B-unsloth-bnb-4bit is quantised by bitsandbytes; give "
        "the 16-bit unsloth/Llama-3.2-1B.",
    ),
    "a 4-bit model of Unsloth's": Case(
        recipe(models=[{"model": "unsloth/mistral-7b-bnb-4bit"}]),
        "The checkpoint unsloth/mistral-7b-bnb-4bit is quantised by bitsandbytes; give the "
        "16-bit unsloth/mistral-7b.",
    ),
    "a compiled model beside itself": Case(
        weights(LAST, lambda t: t.update({f"_orig_mod.{NORM}": t[NORM].clone()})),
        f"Checkpoint {LAST} has …{NORM} and …{NORM}, which are one tensor; save the model again, "
        "or remove one of them.",
    ),
    "a PEFT model, saved whole": Case(
        renamed(LAST, lambda name: f"base_model.model.{name}"),
        f"Checkpoint {LAST} has the tensor base_model.model.…, as PEFT's models have; save it again "
        "after merge_and_unload, or save the adapter alone with save_pretrained.",
    ),
    "an unknown prefix": Case(
        renamed(LAST, lambda name: f"student.{name}"),
        f"Checkpoint {LAST} should have model.embed_tokens.weight of shape [259, 32] by its "
        "config.json but lacks it; use a complete checkpoint.",
    ),
    "a name that only looks like a prefix": Case(
        renamed(LAST, lambda name: f"not_orig_mod.{name}"),
        f"Checkpoint {LAST} should have model.embed_tokens.weight of shape [259, 32] by …",
    ),
    "part of a model of text and images": Case(
        renamed(LAST, lambda name: f"language_model.{name}"),
        f"Checkpoint {LAST} has the tensor language_model.…, as models of text and images have; "
        "save its language model alone with save_pretrained, and give that.",
    ),
    "no head, and not tied": Case(
        weights(LAST, lambda t: t.pop("lm_head.weight")),
        f"Checkpoint {LAST} should have lm_head.weight of shape [259, 32] by its config.json but "
        "lacks it; use a complete checkpoint.",
    ),
    "nothing that is known": Case(
        leaves("weights.safetensors", "step-500/model.safetensors.tmp", "checkpoint-x/a", ".b/c"),
        f"Checkpoint {LAST} has no weights (model.safetensors or …) in {LAST}; give the folder of "
        "a complete Hugging Face checkpoint.",
    ),
}


@each(CASES)
def test_what_it_is_and_what_makes_a_model_of_it(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


def test_a_complete_model_may_have_anything_beside_it(
    family: Family, merge: Callable[..., Path]
) -> None:
    plain = load_model(merge(family.recipe(), "plain"))
    for name in ("zero_to_fp32.py", "model.gguf", "consolidated.safetensors", "adapters.npz"):
        (family.root / FIRST / name).touch()
    for name in ("global_step500", "checkpoint-100", "pytorch_model_fsdp_0"):
        (family.root / FIRST / name).mkdir()
    assert not unlike(load_model(merge(family.recipe(), "beside")), plain)


def test_what_accelerate_joins_is_the_model(
    family: Family, merge: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy, done: the same output as without FSDP."""
    from accelerate.commands.merge import main

    plain = load_model(merge(family.recipe(), "plain"))
    folder = family.root / LAST
    fsdp(folder, folder / "pytorch_model_fsdp_0")
    words = refusal(resolve, str(folder), OpenOptions()).partition("`")[2].partition("`")[0].split()
    assert words[:2] == ["accelerate", "merge-weights"]
    monkeypatch.setattr(sys, "argv", words[1:])
    main()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(family.base / name, folder)
    assert not unlike(load_model(merge(family.recipe(), "joined")), plain)


# ---- bases of adapters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "reference", "fits"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B", True),
        ("unsloth/llama-3.2-1b-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B@main", True),
        ("unsloth/Llama-3.2-3B-bnb-4bit", "unsloth/Llama-3.2-1B", False),
        ("unsloth/Llama-3.2-1B-bnb-8bit", "unsloth/Llama-3.2-1B", False),
    ],
)
def test_an_adapter_of_a_4_bit_model_fits_the_16_bit_one(
    named: str, reference: str, fits: bool, tmp_path: Path
) -> None:
    settings = AdapterConfig("sft", named, False, None, (), {}, False, None)
    if fits:
        check_adapter_base(settings, reference, tmp_path)
        return
    assert_sentence(
        refusal(check_adapter_base, settings, reference, tmp_path),
        f"Checkpoint sft is an adapter for {named}, not for the base_model {reference}; …",
    )


def test_a_4_bit_model_can_be_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    name = "unsloth/Llama-3.2-1B-bnb-4bit"
    assert resolve(name, OpenOptions(), role="model") == tmp_path
