"""The settings of an output's tokenizer are those that transformers 4 reads, with the same ids.

transformers 4 itself is asked by `benchmarks/transformers4.py`, as it cannot be installed beside 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from tests.conftest import Family, build_family
from tests.support.tokenizers import (
    CHAT_TOKENS,
    CHATML,
    add_chat_tokens,
    edit_json,
    ids,
    slow,
)
from upit_merge.errors import UpitError
from upit_merge.models.tokenizer_files import make_readable

Merge = Callable[..., Path]
CONFIG = "tokenizer_config.json"


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_transformers_5_saves(kind: str, tmp_path: Path, merge: Merge) -> None:
    family = build_family(tmp_path / "family", kind=kind, count=1, vocab_size=264)
    (last,) = family.checkpoints
    add_chat_tokens(last)
    AutoTokenizer.from_pretrained(last, local_files_only=True).save_pretrained(last)  # once more
    before = settings(last)
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == [*CHAT_TOKENS]
    assert before["local_files_only"] is before["is_local"] is True
    out = merge(family.recipe())
    after = settings(out)
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["additional_special_tokens"] == [*CHAT_TOKENS]
    assert not {"extra_special_tokens", "local_files_only", "is_local", "backend"} & {*after}
    rest = {"tokenizer_class", "additional_special_tokens"}
    assert {k: v for k, v in after.items() if k not in rest}.items() <= before.items()
    theirs, ours = AutoTokenizer.from_pretrained(last), AutoTokenizer.from_pretrained(out)
    assert ids(out) == ids(last)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.chat_template == theirs.chat_template == CHATML


def test_settings_that_all_read_stay_as_they_are(family: Family, merge: Merge) -> None:
    text = '{"tokenizer_class": "PreTrainedTokenizerFast",\r\n "eos_token":"</s>"}'
    (family.checkpoints[-1] / CONFIG).write_bytes(text.encode())
    (family.checkpoints[-1] / "special_tokens_map.json").write_text('{"eos_token":"</s>"}')
    out = merge(family.recipe())
    assert (out / CONFIG).read_bytes() == text.encode()
    assert (out / "special_tokens_map.json").read_text() == '{"eos_token":"</s>"}'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"extra_special_tokens": ["a"]}, {"additional_special_tokens": ["a"]}),
        ({"extra_special_tokens": []}, {"additional_special_tokens": []}),
        (
            {"additional_special_tokens": ["a", "b"], "extra_special_tokens": ["b", "c"]},
            {"additional_special_tokens": ["a", "b", "c"]},
        ),
        # Names for tokens are a dictionary in both.
        ({"extra_special_tokens": {"image_token": "a"}},) * 2,
        ({"additional_special_tokens": ["a"]},) * 2,
        # Nothing can be said about what only transformers 5 has code for.
        ({"tokenizer_class": "MistralCommonBackend"},) * 2,
        ({"tokenizer_class": "TokenizersBackend"},) * 2,  # without a tokenizer.json
        ({"tokenizer_class": 3},) * 2,
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [CONFIG, "special_tokens_map.json"])
def test_names(name: str, before: Any, after: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(before))
    make_readable(tmp_path)
    assert json.loads((tmp_path / name).read_text()) == after


@pytest.mark.parametrize("text", ["{", "[]", '{"extra_special_tokens": ["\\ud83d"]}', "\0"])
@pytest.mark.parametrize("name", [CONFIG, "special_tokens_map.json"])
def test_odd_settings(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    make_readable(tmp_path)
    after = (tmp_path / name).read_text()
    assert after == text or json.loads(after)  # what is no object at all stays as it is


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_start_and_end_tokens_of_a_llama(single: str, family: Family, merge: Merge) -> None:
    """transformers 4 asks the settings, where it assumes a start token and no end token."""
    last = family.checkpoints[-1]
    tokenizer = AutoTokenizer.from_pretrained(last)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(last)
    edit_json(last / CONFIG, tokenizer_class="LlamaTokenizer")
    out = merge(family.recipe())
    found = settings(out)
    assert found.get("add_bos_token", True) == ("<s>" in single)
    assert found.get("add_eos_token", False) == ("</s>" in single)
    assert ids(out) == ids(last)
    assert ids(out)[0] == (0 if "<s>" in single else ids(last)[0])


def test_what_the_settings_say_already_stays(family: Family, merge: Merge) -> None:
    last = family.checkpoints[-1]
    edit_json(last / CONFIG, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    assert settings(merge(family.recipe()))["add_bos_token"] is False


def test_a_tokenizer_json_that_the_library_refuses(family: Family, merge: Merge) -> None:
    """Nobody could use it: it is refused, and not passed on."""
    last = family.checkpoints[-1]
    edit_json(last / CONFIG, tokenizer_class="LlamaTokenizer")
    (last / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UpitError, match=r"cannot be loaded .*name another model's with"):
        merge(family.recipe())


def test_an_earlier_version_s_output_is_still_verified(tmp_path: Path, merge: Merge) -> None:
    from tests.support.commands import done, invoke

    family = build_family(tmp_path / "family", count=1)
    out = merge(family.recipe())
    (out / CONFIG).write_bytes((family.checkpoints[-1] / CONFIG).read_bytes())
    assert "identical" in done("verify", out).output
    edit_json(out / CONFIG, eos_token="x")
    assert "tokenizer_config.json differs" in invoke("verify", out).output


def test_slow_ones_have_both(tmp_path: Path, merge: Merge) -> None:
    family = build_family(tmp_path / "family", kind="qwen3", count=1, vocab_size=264)
    slow(family.checkpoints[-1])
    out = merge(family.recipe())
    assert (out / CONFIG).read_bytes() == (family.checkpoints[-1] / CONFIG).read_bytes()
    assert (out / "tokenizer.json").is_file()
