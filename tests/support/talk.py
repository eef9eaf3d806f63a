"""Conversations with tiny models: what is typed, what is shown, and what transformers would say."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family, build_family
from tests.support.tokenizers import CHATML, add_chat_tokens
from upit_merge.commands.chat import ChatOptions, Session
from upit_merge.commands.dialogue.voices import load_voices
from upit_merge.report.spoken import Screen

TEMPLATE = f"{CHATML}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
TOKENS = 12


def family_that_talks(root: Path, template: str | None = TEMPLATE, **config: Any) -> Family:
    """Models whose tokenizers have a chat format."""
    settings = {"vocab_size": 261, "noise": 0.2, "max_position_embeddings": 256, **config}
    family = build_family(root, **settings)
    for folder in (family.base, *family.checkpoints):
        add_chat_tokens(folder, template)
    return family


def session(
    folder: Path, *, against: Sequence[Any] = (), screen: Screen | None = None, **options: Any
) -> tuple[Session, io.StringIO]:
    """A session, and what it shows."""
    shown = io.StringIO()
    settings = {"greedy": True, "max_new_tokens": TOKENS, "device": "cpu", **options}
    chosen = ChatOptions(against=against, **settings)
    voices = load_voices(str(folder), against, chosen)
    return Session(voices, chosen, screen or Screen(shown)), shown


def typed(*lines: str | type[BaseException]) -> Any:
    """What reads these lines, or is interrupted, and then is at the end."""
    rest: Iterator[str | type[BaseException]] = iter(lines)

    def read(_prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def said_by_transformers(
    folder: Path, messages: Sequence[dict[str, str]], model: Any = None, **settings: Any
) -> str:
    """The answer to a conversation, of transformers alone."""
    model = model or AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    settings = {"do_sample": False, "max_new_tokens": TOKENS, **settings}
    ended = [1, tokenizer.eos_token_id]
    out = model.generate(ids, **{"eos_token_id": ended, "pad_token_id": 1, **settings})
    answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
