"""The tokenizer of what was trained: that of the model before, in settings that transformers 4 reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import Family, build_family, byte_tokenizer
from tests.support.tokenizers import add_chat_tokens, edit_json, ids
from tests.support.training import Finetune

NAMED = {"default": "{{ messages }}", "tool_use": "{{ tools }}{{ messages }}"}
CONFIG = "tokenizer_config.json"
NOT_IN_4 = {"extra_special_tokens", "local_files_only", "is_local"}


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))


def is_readable(folder: Path) -> bool:
    found = settings(folder)
    return found["tokenizer_class"] == "PreTrainedTokenizerFast" and not NOT_IN_4 & {*found}


def test_of_every_dense_checkpoint(train: Finetune, tmp_path: Path) -> None:
    family = build_family(tmp_path / "family", count=0, vocab_size=264)
    add_chat_tokens(family.base)
    assert not is_readable(family.base)
    out = train(family.base, train_modules="ffn")
    checkpoints = [*out.glob("checkpoint-*")]
    assert len(checkpoints) == 4
    for path in checkpoints:
        assert is_readable(path)
        assert ids(path) == ids(family.base)


def test_of_adapters(train: Finetune, four: Family) -> None:
    out = train(four.base, use_peft=True, lora_r=4, lora_target_modules=["gate_proj"])
    for path in out.glob("checkpoint-*"):
        assert is_readable(path)
        assert ids(path) == ids(four.base)


@pytest.fixture
def named(merge: Callable[..., Path], tmp_path: Path) -> Path:
    """A mixture with two chat templates."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NAMED  # type: ignore[assignment]
    family = build_family(tmp_path / "source", count=2)
    tokenizer.save_pretrained(family.checkpoints[-1])
    return merge(family.recipe(), "named")


def test_named_templates_of_a_mixture(train: Finetune, named: Path) -> None:
    out = train(named, train_modules="router")
    assert AutoTokenizer.from_pretrained(out).chat_template == NAMED
    files = json.loads((out / "upit_report.json").read_text())["files"]
    assert "additional_chat_templates/tool_use.jinja" in files
    assert all((out / name).is_file() for name in files)


def test_a_new_template_is_the_only_one(train: Finetune, named: Path, tmp_path: Path) -> None:
    template = tmp_path / "new.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    out = train(named, train_modules="router", chat_template_path=str(template))
    assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()
    assert is_readable(out)
    assert ids(out) == ids(named)


def test_of_a_mixture_of_an_earlier_version(train: Finetune, moe: Path) -> None:
    edit_json(moe / CONFIG, tokenizer_class="TokenizersBackend", is_local=True)
    out = train(moe, train_modules="router")
    assert is_readable(out)
    assert ids(out) == ids(moe)


def test_links_among_named_templates(train: Finetune, named: Path, tmp_path: Path) -> None:
    from upit_merge.errors import UpitError

    (tmp_path / "secret").write_text("secret")
    (named / "additional_chat_templates" / "evil.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UpitError, match=r"evil.jinja is a link"):
        train(named, train_modules="router")
