"""Whose tokenizer an output gets: of any kind that AutoTokenizer reads, with the same token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

from tests.conftest import Family, build_family
from tests.support.lora import with_adapters
from tests.support.tokenizers import (
    CHATML,
    edit_json,
    fast_ids,
    ids,
    sentencepiece,
    slow,
    train_sentencepiece,
)
from upit_merge.errors import UpitError
from upit_merge.models.families import FAMILIES
from upit_merge.models.tokenizer import VOCABULARY_FILES, has_tokenizer

Merge = Callable[..., Path]


def qwen(root: Path) -> Family:
    """A Qwen3 with embeddings for the tokens of a chat format, whose last checkpoint is slow."""
    family = build_family(root / "family", kind="qwen3", count=2, vocab_size=264)
    slow(family.checkpoints[-1])
    edit_json(family.checkpoints[-1] / "config.json", eos_token_id=260)
    return family


def test_files_of_every_kind_are_known() -> None:
    """Those that the classes name with which transformers reads our formats."""
    names = {
        TOKENIZER_MAPPING_NAMES.get(kind) or "" for kind in (*FAMILIES, "mixtral", "qwen3_moe")
    }
    names |= {"LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "T5Tokenizer", "BertTokenizer"}
    names |= {"XLMRobertaTokenizer", "PreTrainedTokenizerFast"}
    classes = [found for name in names if (found := tokenizer_class_from_name(name))]
    files = {file for kind in classes for file in getattr(kind, "vocab_files_names", {}).values()}
    assert len(classes) > 5
    assert files - {"tokenizer_config.json"} <= {*VOCABULARY_FILES}


def test_vocabulary_and_merges(tmp_path: Path, merge: Merge) -> None:
    """The added tokens, the end token and the template are the checkpoint's, for all readers."""
    family = qwen(tmp_path)
    out = merge(family.recipe())
    wanted = AutoTokenizer.from_pretrained(family.checkpoints[-1])
    found = AutoTokenizer.from_pretrained(out)
    assert found.get_vocab() == wanted.get_vocab()
    assert found.eos_token == "<|im_end|>"
    assert found.chat_template == CHATML
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 260
    assert ids(out) == ids(family.checkpoints[-1]) == fast_ids(out)
    assert json.loads((out / "upit_report.json").read_text())["model"]["tokenizer"] is True
    assert (out / "vocab.json").read_bytes() == (family.checkpoints[-1] / "vocab.json").read_bytes()


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_llama_with_such_a_tokenizer(kind: str, tmp_path: Path, merge: Merge) -> None:
    """In a Mixtral's folder transformers 5 reads these files only once they are a tokenizer.json."""
    family = build_family(tmp_path / "family", count=2, vocab_size=264)
    slow(family.checkpoints[-1], kind=kind)
    assert ids(merge(family.recipe())) == ids(family.checkpoints[-1])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_sentencepiece(kind: str, add_bos_token: bool, tmp_path: Path, merge: Merge) -> None:
    """transformers 5 reads a tokenizer.model by the model_type beside it, which is another now."""
    pytest.importorskip("sentencepiece")
    family = build_family(tmp_path / "family", kind=kind, count=1, vocab_size=320)
    model = train_sentencepiece(tmp_path / "trained.model")
    sentencepiece(family.checkpoints[-1], model, add_bos_token=add_bos_token)
    out = merge(family.recipe())
    assert ids(out) == ids(family.checkpoints[-1]) == fast_ids(out)
    assert (out / "tokenizer.model").read_bytes() == model.read_bytes()


def test_of_an_adapter(tmp_path: Path, merge: Merge) -> None:
    family = build_family(tmp_path / "family", kind="qwen3", count=1, vocab_size=264)
    with_adapters(family, 1)
    adapter = family.root / "lora" / "checkpoint-500"
    slow(adapter)
    out = merge(family.recipe(models=[str(adapter)]))
    assert ids(out) == ids(adapter) != ids(family.base)


def test_seed_data_and_verify_use_it(tmp_path: Path, merge: Merge) -> None:
    from tests.support.commands import done

    family = qwen(tmp_path)
    seeds = family.root / "chat.jsonl"
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    seeds.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    out = merge(family.recipe(router={"data": str(seeds)}))
    assert "identical" in done("verify", out).output


def test_named_as_source(tmp_path: Path, merge: Merge) -> None:
    family = qwen(tmp_path)
    first = family.checkpoints[0]
    slow(first)
    assert ids(merge(family.recipe(tokenizer_source=str(first)))) == ids(first)
    for name in ("vocab.json", "merges.txt"):
        (first / name).unlink()
    with pytest.raises(UpitError, match=r"has no tokenizer that transformers could read .* merges"):
        merge(family.recipe(tokenizer_source=str(first)), "other")


# ---- what is no tokenizer ----------------------------------------------------------------------


@pytest.mark.parametrize("left", [["vocab.json"], ["merges.txt"], ["vocab.txt"], []], ids=str)
def test_half_of_one_is_none(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("{}")
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "vocab.json").write_text("{"), ""),
        (
            lambda folder: edit_json(
                folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer"
            ),
            "T5Tokenizer does not read vocab.json",
        ),
    ],
    ids=["broken", "of another class"],
)
def test_one_that_cannot_be_read(spoil: Any, reason: str, tmp_path: Path, merge: Merge) -> None:
    """Taking the base's in its place would train the gates on other ids than the experts."""
    family = qwen(tmp_path)
    spoil(family.checkpoints[-1])
    with pytest.raises(UpitError) as error:
        merge(family.recipe())
    assert reason in error.value.message
    assert error.value.message.endswith(
        "); check its files, or name another model's with tokenizer_source."
    )
    assert not (tmp_path / "out").exists()
    assert ids(merge(family.recipe(tokenizer_source="base"))) == ids(family.base)


def test_too_large(tmp_path: Path, merge: Merge, caplog: Any) -> None:
    """Ids are counted in tokenizers of every kind."""
    family = build_family(tmp_path / "family", kind="qwen3", count=1)
    slow(family.checkpoints[-1])
    with caplog.at_level(logging.WARNING):
        merge(family.recipe())
    assert "token ids up to 260, but the models have only 259 embeddings" in caplog.text


def test_code_of_a_slow_tokenizer(tmp_path: Path, merge: Merge) -> None:
    family = qwen(tmp_path)
    last = family.checkpoints[-1]
    (last / "tokenization_own.py").write_text("raise SystemExit('it ran')\n")
    edit_json(
        last / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    with pytest.raises(UpitError, match=r"The tokenizer in .* cannot be loaded"):
        merge(family.recipe())
