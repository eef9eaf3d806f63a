"""Seed data: conversations, samples of random tokens, held-out texts of two kinds; tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from upit_merge.data.examples import SeedExample
from upit_merge.data.tokens import TokenizedSample, tokenize_seed_data

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
BIG = {"max_length": 64, "context": 64, "vocab_size": 300}


def make_tokenizer(single: str = "<s> $A", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives back the text exactly."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def tokenized(example: SeedExample, tokenizer: Any, **limits: int) -> TokenizedSample:
    """The one sample that an example comes to."""
    (sample,) = tokenize_seed_data([example], tokenizer, **{**BIG, **limits}).samples
    return sample


def some_samples(count: int = 9) -> list[TokenizedSample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        length = int(torch.randint(4, 40, (), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        samples.append(TokenizedSample(ids, 1 if index % 3 else length // 2, f"sample {index}"))
    return samples


KINDS = {"letters": "abcdefgh", "digits": "0123456789"}


def held_out(root: Path, count: int = 10) -> Path:
    path = root / "held-out.jsonl"
    rows = [
        {"text": letters[i % 5 :] * (1 + i % 3), "kind": kind, "number": i % 2}
        for i in range(count)
        for kind, letters in KINDS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
