"""`data:` of a training: read as the router reads it, given to TRL as TRL's own reader would."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import Family, byte_tokenizer
from tests.support.seeds import CHAT, TEMPLATE
from tests.support.spoilt import assert_sentence, refusal
from tests.support.training import Finetune, changed, weights
from upit_merge.data.examples import read_seed_data
from upit_merge.data.training_set import tokenized_set, training_set

PAIR = {"prompt": "2+2? ", "completion": "4"}
CHAT_PAIR = {"prompt": CHAT[:1], "completion": CHAT[1:]}
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(table: Any, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """What TRL's trainer makes of a table: token ids, and which of them count."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    options = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_length=64)
    trainer = SFTTrainer(
        LlamaForCausalLM(config), options, train_dataset=table, processing_class=tokenizer
    )
    return [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset]


@pytest.mark.parametrize(
    "row", [{"text": "abc"}, PAIR, CHAT_PAIR, {"messages": CHAT}], ids=lambda row: "+".join(row)
)
def test_what_was_trained_on_before_is_the_same(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any]
) -> None:
    """Against the reader of the datasets library, which TRL itself takes."""
    path = jsonl(tmp_path / "train.jsonl", row, {**row, "id": 7}, row)
    table = datasets.load_dataset("json", data_files=str(path), split="train")
    expected = prepared(table, tokenizer, tmp_path)
    assert prepared(training_set(str(path), tokenizer), tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
    ("other", "own"),
    [
        ({"conversations": SHAREGPT}, {"messages": CHAT}),
        ({"instruction": "2+2?", "input": "", "output": "4"}, CHAT_PAIR),
        ({"question": "2+2?", "answer": "4"}, CHAT_PAIR),
    ],
)
def test_what_others_have_trains_alike(
    tmp_path: Path, tokenizer: Any, other: dict[str, Any], own: dict[str, Any]
) -> None:
    tables = [
        training_set(str(jsonl(tmp_path / f"{index}.jsonl", row)), tokenizer)
        for index, row in enumerate((other, own))
    ]
    first, second = (prepared(table, tokenizer, tmp_path) for table in tables)
    assert first == second


def test_a_training_and_the_router_have_the_same_samples(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "blocks.txt").write_text("one\nmore\n\ntwo\nlines\n")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, "a,\nb"], [2, "NA"]])
    for name, count in (("blocks.txt", 2), ("rows.csv", 2)):
        table = training_set(str(tmp_path / name), tokenizer)
        assert table["text"] == [e.text for e in read_seed_data(str(tmp_path / name))]
        assert len(table) == count
    whole = training_set(str(tmp_path), tokenizer)  # tables are read where there is nothing else
    assert whole["text"] == ["one\nmore", "two\nlines"]


def test_arguments_of_calls_are_not_mixed_up(tmp_path: Path, tokenizer: Any) -> None:
    """Not even where the first record has none: TRL gets every conversation as it is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{# tools tool_calls #}"
    calls = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {f"key{i}": i}}}
            ],
        }
        for i in range(3)
    ]
    rows = [{"messages": CHAT}, *({"messages": [*CHAT, call]} for call in calls)]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows[2] |= {"tools": tools, "chat_template_kwargs": {"thinks": True}}
    table = training_set(str(jsonl(tmp_path / "train.jsonl", *rows)), tokenizer)
    assert table["messages"] == [row["messages"] for row in rows]
    assert table["tools"] == [None, None, tools, None]
    assert table["chat_template_kwargs"] == [{}, {}, {"thinks": True}, {}]


# Of which the datasets library's own JSON keeps none but the last two.
NUMBERS = [0.3, 0.7, 0.12345678901234568, 1e-12, 123456789.1234567, 2**64, -(2**70), 19.99, 5]


def test_numbers_in_calls_and_tools_stay_as_they_are(tmp_path: Path) -> None:
    """By what transformers itself writes of them."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['arguments'] | tojson }}{% endfor %}{% endfor %}{{ tools | tojson }}"
        "{{ scale | tojson }}"
    )
    rows = []
    for number in NUMBERS:
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": number}}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        besides = {"tools": [{"least": number}], "chat_template_kwargs": {"scale": number}}
        rows.append({"messages": [CHAT[0], turn], **besides})
    table = training_set(str(jsonl(tmp_path / "train.jsonl", *rows)), tokenizer)
    assert [*table] == rows
    expected = [
        tokenizer.apply_chat_template(
            row["messages"],
            tools=row["tools"],
            tokenize=True,
            return_dict=False,
            **row["chat_template_kwargs"],
        )
        for row in rows
    ]
    found = [row["input_ids"] for row in prepared(table, tokenizer, tmp_path)]
    assert found == [ids[:64] for ids in expected]
    assert tokenizer.decode(found[0]).startswith('2+2?{"x": 0.3}')


def test_a_file_that_changes_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "train.jsonl", {"text": "a"})
    first = training_set(str(path), tokenizer)
    again = training_set(str(path), tokenizer)
    assert again.cache_files == first.cache_files
    jsonl(path, {"text": "b"}, {"text": "c"})
    assert training_set(str(path), tokenizer)["text"] == ["b", "c"]


def test_another_column_of_text(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "train.jsonl", {"body": "a"})
    assert training_set(str(path), tokenizer, text="body")["body"] == ["a"]


def test_a_dataset_id(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"question": "2+2?", "answer": "4", "id": 1}])

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        assert (args, kwargs) == (("org/name", "main"), {"split": "test", "revision": None})
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = training_set("org/name", tokenizer, split="test", config="main")
    assert table.to_list() == [CHAT_PAIR]


def test_token_ids_are_for_trainers_alone(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    path = jsonl(tmp_path / "train.jsonl", *rows)
    assert tokenized_set(str(path)).to_list() == rows
    assert tokenized_set(str(jsonl(tmp_path / "text.jsonl", {"text": "a"}))) is None
    assert_sentence(
        refusal(read_seed_data, str(path)), "…has `input_ids`, `labels` and no usable column; …"
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"text": "a"}, {"messages": CHAT}],
            "…line 1 is a text, but …line 2 is a conversation, and a model is trained on one of "
            "them at a time; make them alike, or files of their own.",
        ),
        (
            [PAIR, CHAT_PAIR],
            "…line 1 is a prompt with its completion, but …line 2 is a prompt with its completion, "
            "as messages, and a model…",
        ),
        ([{"chosen": "a"}], "…line 1 has `chosen` and no usable column; …"),
    ],
)
def test_data_that_is_refused(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], sentence: str
) -> None:
    path = jsonl(tmp_path / "train.jsonl", *rows)
    assert_sentence(refusal(training_set, str(path), tokenizer), sentence)


def test_conversations_without_a_template(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "train.jsonl", {"messages": CHAT}))
    assert_sentence(
        refusal(training_set, path, byte_tokenizer()),
        "…line 1 is a conversation, but the tokenizer has no chat template; use a `text` column, or "
        "set chat_template_path.",
    )
    assert len(training_set(path, byte_tokenizer(), other_template=True)) == 1


def test_a_run_on_a_table_and_on_its_rows_ends_with_the_same_bytes(
    train: Finetune, four: Family, tmp_path: Path
) -> None:
    texts = [f"sample {i}: " + "abcdef"[i % 6] * (5 + i % 20) for i in range(32)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    first = train(four.base, "first", max_steps=2, save_steps=2, packing=True)
    second = train(
        four.base,
        "second",
        max_steps=2,
        save_steps=2,
        packing=True,
        data=str(tmp_path / "train.csv"),
    )
    one, other = (out / "checkpoint-2" for out in (first, second))
    assert weights(one)
    assert not changed(one, other)


def test_what_a_run_refuses(train: Finetune, four: Family, tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_text("a")
    message = refusal(train, four.base, data=str(tmp_path / "train.xlsx"))
    assert_sentence(
        message,
        "…data is …train.xlsx, expected a file that ends in .jsonl, .json, .parquet, .csv, .tsv, "
        ".txt.",
    )
    path = jsonl(tmp_path / "mixed.jsonl", {"text": "a"}, {"text": None, "id": 1})
    assert "mixed.jsonl line 2 has `id` and no usable column" in refusal(
        train, four.base, data=str(path)
    )
    assert not (tmp_path / "trained").exists()


def test_tools_that_the_template_leaves_out_are_told_of_once(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    training_set(
        str(jsonl(tmp_path / "a.jsonl", *[{"messages": CHAT, "tools": [tool]}] * 5)), tokenizer
    )
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "a.jsonl line 1 has tools, which the tokenizer's chat template leaves out" in warning
