"""Chat templates of other models, which bring tokens along: what stage 1 leaves for stage 2."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import VOCABULARY, build_family, byte_tokenizer
from tests.support.training import Finetune, cut_off_after_saving
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.models.lora.adapter import Adapter, open_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
NEW, PADDED = ["<|im_start|>", "<|im_end|>"], 320  # TRL pads to a multiple of 64
FFN = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, Any]:
    """Settings of a training on conversations, with the template of another model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    tokenizer.eos_token = NEW[1]
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"a {i}"},
            ]
        }
        for i in range(16)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": str(data),
        "chat_template_path": str(tmp_path / "chat"),
        "max_length": 48,
        "num_train_epochs": 1,
        "save_steps": 2,
    }


LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_target_modules": FFN}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]], ids=["rows", "tables"])
def test_adapters_with_new_tokens_are_what_peft_makes_of_them(
    train: Finetune, tmp_path: Path, chat: dict[str, Any], tied: bool, whole: Any
) -> None:
    base = build_family(tmp_path / "family", count=0, tie_word_embeddings=tied).base
    out = train(base, **LORA, **chat, lora_modules_to_save=whole)
    last = out / "checkpoint-4"
    tokenizer = AutoTokenizer.from_pretrained(last)
    assert tokenizer.convert_tokens_to_ids(NEW) == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer.chat_template == CHATML
    settings = json.loads((last / "generation_config.json").read_text())
    assert settings["eos_token_id"] == VOCABULARY + 1

    ours = read_adapter(base, last)
    assert ours.config.vocab_size == PADDED
    assert ours.config.tie_word_embeddings == (tied and whole is None)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(PADDED)
    text = [{"role": "user", "content": "q3"}, {"role": "assistant", "content": "a 3"}]
    ids = torch.tensor([tokenizer.apply_chat_template(text, return_dict=False)])
    assert VOCABULARY in ids
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, last).eval()(ids).logits
        found = ours(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    before = read_adapter(base, out / "checkpoint-2").model.embed_tokens.weight
    assert not torch.equal(before[VOCABULARY], ours.model.embed_tokens.weight[VOCABULARY])
    fresh = AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight
    learned = ours.model.embed_tokens.weight
    assert torch.equal(learned[:VOCABULARY], fresh) == (whole is None)


def test_a_run_with_new_tokens_that_is_cut_off_ends_with_the_same_bytes(
    train: Finetune, tmp_path: Path, chat: dict[str, Any]
) -> None:
    base = build_family(tmp_path / "family", count=0, tie_word_embeddings=True).base
    whole = train(base, "whole", **LORA, **chat)
    with cut_off_after_saving():
        train(base, "cut", **LORA, **chat)
    cut = train(base, "cut", **LORA, **chat)
    for name in ("adapter_model.safetensors", "generation_config.json", "tokenizer.json"):
        pair = [folder / "checkpoint-4" / name for folder in (whole, cut)]
        assert pair[0].read_bytes() == pair[1].read_bytes(), name


def test_the_head_beside_tied_rows(train: Finetune, tmp_path: Path, chat: dict[str, Any]) -> None:
    base = build_family(tmp_path / "family", count=0, tie_word_embeddings=True).base
    with pytest.raises(UpitError, match=r"lora_modules_to_save has lm_head, but the chat templ"):
        train(base, **LORA, **chat, lora_modules_to_save=["lm_head"])
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_weights_with_new_tokens(
    train: Finetune, tmp_path: Path, chat: dict[str, Any], tied: bool
) -> None:
    """A complete checkpoint with the larger vocabulary, and what belongs to it."""
    base = build_family(tmp_path / "family", count=0, tie_word_embeddings=tied).base
    last = train(base, **chat) / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(last)
    assert model.config.vocab_size == PADDED
    assert model.get_input_embeddings().weight.shape[0] == PADDED
    assert model.generation_config.eos_token_id == VOCABULARY + 1
    assert AutoTokenizer.from_pretrained(last).chat_template == CHATML


def test_a_mixture_cannot_carry_them(train: Finetune, moe: Path, chat: dict[str, Any]) -> None:
    with pytest.raises(UpitError, match=r"The chat template adds tokens .* train without use_peft"):
        train(moe, use_peft=True, lora_target_modules=["q_proj"], **chat)


def read_adapter(base: Path, folder: Path) -> Any:
    """What transformers makes of the settings and tensors that a merge reads."""
    with closing(Checkpoint("base", base, OpenOptions())) as complete:
        adapter = open_model(str(folder), complete, OpenOptions(), lambda *_: complete)
        assert isinstance(adapter, Adapter)
        with closing(adapter):
            tensors = {name: adapter.tensor(name) for name in adapter.specs}
            config = AutoConfig.for_model(**adapter.config)
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()
