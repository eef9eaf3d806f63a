"""Data as people have it, in other columns and other words: the same tokens as in ours."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.seeds import BIG, CHAT, make_tokenizer
from tests.support.spoilt import assert_sentence, refusal
from upit_merge.data.examples import read_seed_data
from upit_merge.data.tokens import SeedSet, tokenize_seed_data

LIMITS = {**BIG, "max_length": 4000, "context": 4000}
# A template that knows tools, as those of Llama 3 and Qwen do.
TOOLS = (
    "{{ bos_token }}{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is not none %}{{ m['content'] }}"
    "{% endif %}{% for c in m['tool_calls'] or [] %}<{{ c['function']['name'] }}:"
    "{{ c['function']['arguments'] | tojson }}>{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
LONG = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 2 more?"},
    {"role": "assistant", "content": "6"},
]
CALLING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


def seed_set(tmp_path: Path, tokenizer: Any, *records: dict[str, Any]) -> SeedSet:
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return tokenize_seed_data(read_seed_data(str(path)), tokenizer, **LIMITS)


def ids(tmp_path: Path, tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], int]:
    (sample,) = seed_set(tmp_path, tokenizer, record).samples
    return sample.input_ids, sample.loss_start


def as_from_value(messages: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"} | names
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


@pytest.fixture(scope="module")
def tools_tokenizer() -> Any:
    return make_tokenizer(template=TOOLS)


# ---- conversations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": as_from_value(LONG)},
        {"conversations": as_from_value(LONG, user="user", assistant="assistant")},
        {"conversations": as_from_value(LONG[1:]), "system": "Be short."},
        {"conversations": LONG},
        {
            "conversations": [
                {**m, "role": {"user": "human"}.get(m["role"], m["role"])} for m in LONG
            ]
        },
        {"conversation": LONG, "model": "x"},
        {"messages": as_from_value(LONG)},
        {"messages": json.dumps(LONG)},
        {"conversations": json.dumps(as_from_value(LONG))},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in LONG]},
        {
            "conversations": [
                {"from": m["from"], "value": m["value"], "loss": 1} for m in as_from_value(LONG)
            ]
        },
    ],
    ids=range(11),
)
def test_a_conversation_in_other_words_has_the_same_tokens(
    tmp_path: Path, tokenizer: Any, record: dict[str, Any]
) -> None:
    """As transformers makes them of the messages, every turn counting as it does today."""
    expected = tokenizer.apply_chat_template(LONG, return_dict=False)
    assert ids(tmp_path, tokenizer, record) == (expected, 1)
    assert ids(tmp_path, tokenizer, {"messages": LONG}) == (expected, 1)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CALLING, "tools": [TOOL]},
        {"messages": CALLING, "tools": json.dumps([TOOL])},
        {
            "messages": [
                CALLING[0],
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'},
                        }
                    ],
                },
                *CALLING[2:],
            ],
            "tools": [TOOL],
        },
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "It is 4."},
            ],
            "tools": json.dumps([FUNCTION]),
        },
    ],
    ids=["objects", "tools as JSON", "arguments as JSON", "ShareGPT"],
)
def test_calls_of_tools(tmp_path: Path, tools_tokenizer: Any, record: dict[str, Any]) -> None:
    expected = tools_tokenizer.apply_chat_template(CALLING, tools=[TOOL], return_dict=False)
    assert '<add:{"a": 2, "b": 2}>' in tools_tokenizer.decode(expected)
    assert ids(tmp_path, tools_tokenizer, record) == (expected, 1)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tmp_path: Path, tools_tokenizer: Any, tools: Any) -> None:
    expected = tools_tokenizer.apply_chat_template(LONG, return_dict=False)
    found = ids(tmp_path, tools_tokenizer, {"messages": LONG, "tools": tools})
    assert found == (expected, 1)


def test_a_table_pads_what_is_not_there(tmp_path: Path, tools_tokenizer: Any) -> None:
    """In parquet the arguments of one call are keys of all: those not given are None."""
    other = {"type": "function", "function": {"name": "neg", "arguments": {"x": 1}}}
    calling = [CALLING[0], {**CALLING[1], "tool_calls": [other]}, *CALLING[2:]]
    rows = [{"messages": CALLING}, {"messages": calling}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "seed.parquet")
    examples = read_seed_data(str(tmp_path / "seed.parquet"))
    found = tokenize_seed_data(examples, tools_tokenizer, **LIMITS).samples
    for sample, row in zip(found, rows, strict=True):
        expected = tools_tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert sample.input_ids == expected


def test_settings_of_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% if thinks %}?{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    record = {"messages": CHAT, "chat_template_kwargs": {"thinks": True}}
    found, _ = ids(tmp_path, tokenizer, record)
    assert tokenizer.decode(found) == "2+2??4?"


# ---- instructions --------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add.\n\n### Input:\n2+2\n\n### Response:\n"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n2+2?\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("record", "question", "plain", "reading"),
    [
        (
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            "Add.\n2+2",
            ALPACA,
            "`instruction`, `input` and `output`",
        ),
        (
            {"instruction": "2+2?", "input": "", "output": "4"},
            "2+2?",
            ALPACA_NO_INPUT,
            "`instruction`, `input` and `output`",
        ),
        (
            {"instruction": "Add.", "context": "2+2", "response": "4", "category": "x"},
            "Add.\n2+2",
            ALPACA,
            "`instruction`, `context` and `response`",
        ),
        *(
            ({asked: "2+2?", told: "4"}, "2+2?", ALPACA_NO_INPUT, f"`{asked}` and `{told}`")
            for asked, told in [
                ("question", "answer"),
                ("prompt", "response"),
                ("query", "response"),
                ("instruction", "output"),
                ("input", "output"),
            ]
        ),
    ],
)
def test_an_instruction_is_a_prompt_and_its_answer_a_completion(
    tmp_path: Path,
    tokenizer: Any,
    record: dict[str, Any],
    question: str,
    plain: str,
    reading: str,
) -> None:
    """As a chat where there is a template, in Alpaca's prompt where there is none."""
    chat = {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    assert ids(tmp_path, tokenizer, record) == ids(tmp_path, tokenizer, chat)
    said = f"Seed data: 1 sample, 2 target tokens; {reading} read as prompt and completion"
    assert seed_set(tmp_path, tokenizer, record).summary() == f"{said}."
    bare = make_tokenizer()
    expected = ids(tmp_path, bare, {"prompt": plain, "completion": "4"})
    assert ids(tmp_path, bare, record) == expected
    summary = seed_set(tmp_path, bare, record).summary()
    assert summary == f"{said}, in Alpaca's prompt (there is no chat template)."


def test_what_comes_before_an_instruction(tmp_path: Path, tokenizer: Any) -> None:
    record = {
        "system": "Be short.",
        "history": [["2+2?", "4"]],
        "instruction": "And 2 more?",
        "input": "",
        "output": "6",
    }
    chat = {"prompt": LONG[:4], "completion": LONG[4:]}
    assert ids(tmp_path, tokenizer, record) == ids(tmp_path, tokenizer, chat)


def test_what_was_read_before_comes_first(tmp_path: Path, tokenizer: Any) -> None:
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    assert ids(tmp_path, tokenizer, {**alpaca, "text": "t"}) == ids(
        tmp_path, tokenizer, {"text": "t"}
    )
    both = {**alpaca, "question": "q", "answer": "a", "messages": CHAT}
    assert ids(tmp_path, tokenizer, both) == ids(tmp_path, tokenizer, {"messages": CHAT})
    assert seed_set(tmp_path, tokenizer, both).readings == ()


# ---- tables of text ------------------------------------------------------------------------


def test_a_csv_is_what_its_rows_are(tmp_path: Path, tokenizer: Any) -> None:
    """Written by Python, read as the datasets library reads it, but that all cells are texts."""
    rows = [
        {"prompt": 'say "a",\nb', "completion": "é", "domain": "x"},
        {"prompt": "007", "completion": "NA", "domain": "0"},
    ]
    with (tmp_path / "seed.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    examples = read_seed_data("seed.csv", column="domain")
    found = [(e.source, e.prompt, e.completion, e.label) for e in examples]
    assert found == [
        ("seed.csv line 2", 'say "a",\nb', "é", "x"),
        ("seed.csv line 4", "007", "NA", "0"),
    ]
    table = datasets.load_dataset(
        "csv", data_files="seed.csv", split="train", cache_dir="cache", keep_default_na=False
    )
    assert table[0]["prompt"] == examples[0].prompt
    text = (tmp_path / "seed.csv").read_text(encoding="utf-8-sig").replace(",", "\t")
    (tmp_path / "seed.tsv").write_text(text, encoding="utf-8")
    assert len(read_seed_data("seed.tsv")) == 2


def test_conversations_in_a_csv(tmp_path: Path, tokenizer: Any) -> None:
    with (tmp_path / "seed.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["conversations"], [json.dumps(as_from_value(LONG))]])
    found = tokenize_seed_data(read_seed_data("seed.csv"), tokenizer, **LIMITS)
    assert found.samples[0].input_ids == tokenizer.apply_chat_template(LONG, return_dict=False)
    assert found.readings == ("`conversations` read as messages",)


# ---- bad neighbours ------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            "has 'narrator' as `from` of message 1 of `conversations`; make it human, gpt, system, "
            "function_call or observation.",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "has nothing as `value` of message 1 of `conversations`; make it a valid string.",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"role": "user", "content": "b"}]},
            "has nothing as `from` of message 2 of `conversations`; make it a valid string.",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(2, 2)"}]},
            "has no call of a function as `value` of message 1 of `conversations`; make it JSON "
            "with `name` and `arguments`.",
        ),
        (
            {"conversations": "hello"},
            "has a string as `conversations`; make it a list of {role, content}.",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "has a part of type 'image_url' in `content` of message 1 of `messages`, but these "
            "models read text only; leave the record out.",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "has nothing as `content` of message 1 of `messages`; make it a valid string.",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "add"}]},
            "has a string as `tool_calls` of message 1 of `messages`; make it a list of objects.",
        ),
        (
            {"messages": CHAT, "tools": "add"},
            "has a string as `tools`; make it a list of functions.",
        ),
        (
            {"messages": CHAT, "chat_template_kwargs": {"tokenize": False}},
            "has an object as `chat_template_kwargs` that is none, or sets what is not the data's "
            "business; make it an object of the template's own settings.",
        ),
        (
            {"question": "2+2?", "answer": 4},
            "has a number as `answer`; make it a valid string.",
        ),
        (
            {"instruction": "a", "input": ["b"], "output": "c"},
            "has a list as `input`; make it a valid string.",
        ),
        (
            {"instruction": "a", "output": "c", "history": [["b"]]},
            "has a list as `history`; make it a list of [question, answer].",
        ),
        (
            {"instruction": "a", "outputs": "c"},
            "has `instruction`, `outputs` and no usable column; …",
        ),
    ],
)
def test_bad_record(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    (tmp_path / "seed.jsonl").write_text(f'{{"text": "a"}}\n{json.dumps(record)}\n')
    assert_sentence(refusal(read_seed_data, "seed.jsonl"), f"seed.jsonl line 2 {sentence}")


def test_calls_that_the_template_does_not_know(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    said = [CALLING[0], {**CALLING[1], "content": "Wait."}, *CALLING[2:]]
    seed_set(tmp_path, tokenizer, {"messages": said}, {"messages": said})
    assert [record.message.partition("seed.jsonl ")[2] for record in caplog.records] == [
        "line 1 has tool_calls, which the tokenizer's chat template leaves out; set a "
        "`chat_template` that knows them, or leave such records out."
    ]
    caplog.clear()
    seed_set(tmp_path, tokenizer, {"messages": CHAT, "tools": [TOOL]})
    assert "line 1 has tools, which" in caplog.text
    message = refusal(seed_set, tmp_path, tokenizer, {"messages": CALLING})
    assert_sentence(
        message,
        "…seed.jsonl line 1 has a message that is a call of a tool, which the tokenizer's chat "
        "template does not know; set another `chat_template` in the recipe, or leave the record "
        "out.",
    )
