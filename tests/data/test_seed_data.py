"""Seed data: every format and column kind, where the loss starts, what is cut."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.seeds import BIG, CHAT, TEMPLATE, make_tokenizer, tokenized
from upit_merge.data import tokens as seed_tokens
from upit_merge.data.examples import SeedExample, read_seed_data, sample_examples
from upit_merge.data.tokens import tokenize_seed_data


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def targets(sample, tokenizer):
    return tokenizer.decode(sample.input_ids[sample.loss_start :])


# ---- formats -------------------------------------------------------------------------------


def test_jsonl_keeps_line_numbers_over_blank_lines_and_exotic_line_ends(tmp_path):
    exotic = "a\u2028b\x85c"  # str.splitlines would cut here, JSON does not
    lines = ["\ufeff" + json.dumps({"text": exotic}, ensure_ascii=False), "", '{"text": "two"}\r']
    (tmp_path / "seed.jsonl").write_bytes("\n".join(lines).encode())
    assert read_seed_data("seed.jsonl") == [
        SeedExample("seed.jsonl line 1", text=exotic),
        SeedExample("seed.jsonl line 3", text="two"),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list(tmp_path, indent):
    (tmp_path / "seed.json").write_text(
        "\n" + json.dumps([{"text": "a"}, {"text": "b"}], indent=indent)
    )
    sources = [(example.source, example.text) for example in read_seed_data("seed.json")]
    assert sources == [("seed.json record 1", "a"), ("seed.json record 2", "b")]


def test_json_lines_in_a_json_file(tmp_path):
    write_jsonl(tmp_path / "seed.JSON", {"text": "a"}, {"text": "b"})
    assert [example.text for example in read_seed_data("seed.JSON")] == ["a", "b"]


def test_parquet_with_a_different_kind_in_each_row(tmp_path):
    rows = [
        {"messages": CHAT, "prompt": None, "completion": None, "text": None, "extra": 1},
        {"messages": None, "prompt": "p", "completion": "c", "text": "t", "extra": 2},
        {"messages": None, "prompt": "p", "completion": None, "text": "t", "extra": 3},
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "seed.parquet", row_group_size=2)
    assert read_seed_data("seed.parquet") == [
        SeedExample("seed.parquet row 1", messages=CHAT),
        SeedExample("seed.parquet row 2", prompt="p", completion="c"),
        SeedExample("seed.parquet row 3", text="t"),
    ]


def test_text_blocks(tmp_path):
    (tmp_path / "seed.txt").write_bytes(b"\n\none\r\n  more\r\n \t\r\n\r\ntwo\n\n\n")
    assert read_seed_data("seed.txt") == [
        SeedExample("seed.txt line 3", text="one\n  more"),
        SeedExample("seed.txt line 7", text="two"),
    ]


def test_folder_in_sorted_order(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", {"text": "b"})
    (folder / "a.txt").write_text("a")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c"]}), folder / "c.parquet")
    for passed_over in ("README.md", ".hidden.jsonl", "sub/d.txt"):
        (folder / passed_over).write_text("not seed data")
    assert [example.text for example in read_seed_data("data")] == ["a", "b", "c"]
    assert [example.text for example in read_seed_data(str(folder))] == ["a", "b", "c"]


def test_dataset_id(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("org/name", "main"), {"split": "test", "revision": "v1"})
        return datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b", "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_seed_data("org/name@v1", split="test", config="main") == [
        SeedExample("org/name@v1 test row 1", text="a"),
        SeedExample("org/name@v1 test row 2", text="b"),
    ]


# ---- columns -------------------------------------------------------------------------------


def test_precedence_of_columns(tmp_path):
    everything = {"text": "t", "prompt": "p", "completion": "c", "messages": CHAT, "id": 7}
    no_messages = {**everything, "messages": None}
    no_completion = {**no_messages, "completion": None}
    write_jsonl(tmp_path / "seed.jsonl", everything, no_messages, no_completion)
    assert read_seed_data("seed.jsonl") == [
        SeedExample("seed.jsonl line 1", messages=CHAT),
        SeedExample("seed.jsonl line 2", prompt="p", completion="c"),
        SeedExample("seed.jsonl line 3", text="t"),
    ]


def test_conversational_prompt_and_completion(tmp_path):
    write_jsonl(tmp_path / "seed.jsonl", {"prompt": CHAT[:1], "completion": CHAT[1:]})
    (example,) = read_seed_data("seed.jsonl")
    assert (example.prompt, example.completion) == (CHAT[:1], CHAT[1:])


# ---- tokens --------------------------------------------------------------------------------


def test_text_and_messages_count_from_the_second_token(tokenizer):
    text = tokenized(SeedExample("s", text="héllo"), tokenizer)
    assert text.input_ids == tokenizer("héllo")["input_ids"]
    assert (text.loss_start, targets(text, tokenizer), text.source) == (1, "héllo", "s")
    chat = tokenized(SeedExample("s", messages=CHAT), tokenizer)
    assert chat.loss_start == 1
    assert tokenizer.decode(chat.input_ids) == "<s>[user]2+2?</s>[assistant]4</s>"


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A", "$A </s>"])
def test_prompt_and_completion_strings(single):
    tokenizer = make_tokenizer(single)
    sample = tokenized(SeedExample("s", prompt="Q: 2+2? A:", completion=" 4 é"), tokenizer)
    bos = "<s>" if single.startswith("<s>") else ""
    assert tokenizer.decode(sample.input_ids) == f"{bos}Q: 2+2? A: 4 é</s>"
    assert targets(sample, tokenizer) == " 4 é</s>"
    assert sample.num_targets == len(" 4 é".encode()) + 1


def test_eos_in_the_data_itself(tokenizer):
    sample = tokenized(SeedExample("s", prompt="a</s>", completion="b</s>"), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>a</s>b</s>"
    adds_eos = make_tokenizer("<s> $A </s>")
    sample = tokenized(SeedExample("s", prompt="a</s>", completion="b"), adds_eos)
    assert adds_eos.decode(sample.input_ids) == "<s>a</s>b</s>"


def test_empty_prompt():
    with_bos = tokenized(
        SeedExample("s", prompt="", completion="ab"), make_tokenizer("<s> $A </s>")
    )
    assert (with_bos.input_ids[0], with_bos.loss_start, with_bos.num_targets) == (0, 1, 3)
    without = tokenized(SeedExample("s", prompt="", completion="ab"), make_tokenizer("$A"))
    assert (without.loss_start, without.num_targets) == (1, 2)  # nothing predicts the first token


def test_no_eos_token():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    sample = tokenized(SeedExample("s", prompt="a", completion="b"), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>ab"


def test_conversational_completion_starts_after_the_generation_prompt(tokenizer):
    sample = tokenized(SeedExample("s", prompt=CHAT[:1], completion=CHAT[1:]), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>[user]2+2?</s>[assistant]4</s>"
    assert targets(sample, tokenizer) == "4</s>"


def test_generation_prompt_that_the_answer_does_not_continue():
    template = TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    tokenizer = make_tokenizer(template=template)
    sample = tokenized(SeedExample("s", prompt=CHAT[:1], completion=CHAT[1:]), tokenizer)
    assert targets(sample, tokenizer) == "4</s>"


# ---- what is cut ---------------------------------------------------------------------------


def test_what_was_cut_is_counted(tokenizer):
    examples = [
        SeedExample("1", text="a" * 7),  # 8 tokens with BOS: fits
        SeedExample("2", text="b" * 9),  # 10 tokens: loses 2
        SeedExample("3", text=""),  # BOS only
        SeedExample("4", prompt="p" * 4, completion="c" * 5),  # 1 + 4 + 5 + EOS: loses 3
        SeedExample("5", prompt="p" * 7, completion="c"),  # the prompt fills it
        SeedExample("6", text="a" * 7),
        SeedExample("7", text="b" * 8),  # what is left of it says the same as that of the second
    ]
    cut = tokenize_seed_data(examples, tokenizer, max_length=8, context=64, vocab_size=258)
    assert [sample.source for sample in cut.samples] == ["1", "2", "4"]
    assert [len(sample.input_ids) for sample in cut.samples] == [8, 8, 8]
    assert targets(cut.samples[2], tokenizer) == "ccc"
    assert cut.to_report() == {
        "samples": 3,
        "tokens": 24,
        "target_tokens": 7 + 7 + 3,
        "max_length": 8,
        "truncated_samples": 2,
        "tokens_cut": 5,
        "dropped_too_short": 1,
        "dropped_prompt_too_long": 1,
        "dropped_repeated": 2,
    }
    assert cut.summary() == (
        "Seed data: 3 samples, 17 target tokens; 2 samples cut to 8 tokens (5 tokens lost); "
        "1 sample dropped as too short; 1 sample dropped because the prompt alone fills 8 tokens; "
        "2 samples dropped as the same as an earlier one."
    )


def test_equal_tokens_of_another_kind_or_with_another_prompt_are_kept(tokenizer):
    examples = [
        SeedExample("1", text="abc", label="x"),
        SeedExample("2", text="abc", label="y"),
        SeedExample("3", prompt="a", completion="bc", label="x"),
        SeedExample("4", prompt="ab", completion="c", label="x"),
        SeedExample("5", prompt="ab", completion="c", label="x"),
    ]
    found = tokenize_seed_data(examples, tokenizer, **BIG)
    assert [sample.source for sample in found.samples] == ["1", "2", "3", "4"]


def test_never_beyond_the_context(tokenizer):
    cut = tokenize_seed_data(
        [SeedExample("1", text="a" * 99)], tokenizer, max_length=50, context=10, vocab_size=258
    )
    assert (cut.max_length, len(cut.samples[0].input_ids), cut.tokens_cut) == (10, 10, 90)


def test_nothing_cut(tokenizer):
    whole = tokenize_seed_data([SeedExample("1", text="a")], tokenizer, **BIG)
    assert whole.summary() == "Seed data: 1 sample, 1 target token."


# ---- sampling ------------------------------------------------------------------------------


def test_sampling():
    examples = [SeedExample(str(number), text="x") for number in range(1500)]

    def chosen(sample, seed=0):
        return [int(example.source) for example in sample_examples(examples, sample, seed)]

    assert chosen(0.1) == chosen(0.1) == sorted(set(chosen(0.1)))
    assert chosen(0.1) != chosen(0.1, seed=1)
    asked = [0.1, 1.0, 1e-9, 1, 20, 9999, None]  # 1.0 is all of it, 1 is one sample
    assert [len(chosen(sample)) for sample in asked] == [150, 1500, 1, 1, 20, 1500, 1000]


def test_import_is_cheap():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'}"
    code = f"import sys, {seed_tokens.__name__}\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_without_blank_lines_is_a_sample_per_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\nthree\n\n")
    assert [example.text for example in read_seed_data(str(path))] == ["one", "two", "three"]
    path.write_text("one\ntwo\n\nthree\n")
    assert [example.text for example in read_seed_data(str(path))] == ["one\ntwo", "three"]
