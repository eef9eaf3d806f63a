"""Tokenizers as they lie in real folders: of transformers 4 without tokenizer.json, of sentencepiece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import VOCABULARY, byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# What the kinds of tokenizers here treat differently: spaces, line ends, text after a special token.
TEXT = " The  capital xyz\n é</s>the<|im_end|> fox ab"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` as a value removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def added(tokens: Sequence[str], first: int) -> dict[str, dict[str, Any]]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        str(first + i): {"content": token, "special": True, **flags}
        for i, token in enumerate(tokens)
    }


def slow(folder: Path, *, template: str | None = CHATML, kind: str = "Qwen2Tokenizer") -> None:
    """Put vocab.json and merges.txt there instead of tokenizer.json, and a chat format's tokens."""
    vocabulary = byte_tokenizer().get_vocab()
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = {token: VOCABULARY + i for i, token in enumerate(CHAT_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    tokens = {"bos_token": None, "eos_token": CHAT_TOKENS[1], "pad_token": "<pad>"}
    settings = {
        **tokens,
        "tokenizer_class": kind,
        "unk_token": None,
        "chat_template": template,
        "added_tokens_decoder": added(CHAT_TOKENS, VOCABULARY),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sentencepiece(folder: Path, model: Path, *, add_bos_token: bool = True) -> None:
    """Put tokenizer.model there instead of tokenizer.json, as a slow Llama tokenizer leaves it."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": add_bos_token,
        "added_tokens_decoder": added(["<unk>", "<s>", "</s>"], 0),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def train_sentencepiece(path: Path) -> Path:
    """Train a small model with Llama's settings; needs the library, which is no dependency."""
    import sentencepiece as library

    text = path.with_suffix(".txt")
    line = "the capital of France is Paris and the quick brown fox"
    text.write_text("\n".join(f"sample {i} {line}" for i in range(200)))
    library.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return path.with_suffix(".model")


def add_chat_tokens(folder: Path, template: str | None = CHATML) -> None:
    """Save there what a fine-tuning with transformers 5 leaves that has added a chat format."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def ids(folder: Path, text: str = TEXT) -> list[int]:
    """Return what transformers makes of a text with the tokenizer in a folder."""
    found: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return found


def fast_ids(folder: Path, text: str = TEXT) -> list[int]:
    """Return what a program makes of it that reads tokenizer.json and nothing else."""
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


def logits(folder: Path, numbers: Sequence[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([list(numbers)])).logits
    return result
