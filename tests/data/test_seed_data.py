"""Seed data: every format and column kind, where the loss starts, what is cut, every error."""

import json
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from upit_merge.data import tokens as seed_tokens
from upit_merge.data.examples import SeedExample, read_seed_data, sample_examples
from upit_merge.data.tokens import tokenize_seed_data
from upit_merge.errors import UpitError

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
BIG = {"max_length": 64, "context": 64, "vocab_size": 300}


def make_tokenizer(single="<s> $A", template=None):
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


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(template=TEMPLATE)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Relative paths, so that the expected sentences can be written out in full."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def targets(sample, tokenizer):
    return tokenizer.decode(sample.input_ids[sample.loss_start :])


def one(example, tokenizer, **limits):
    (sample,) = tokenize_seed_data([example], tokenizer, **{**BIG, **limits}).samples
    return sample


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
    text = one(SeedExample("s", text="héllo"), tokenizer)
    assert text.input_ids == tokenizer("héllo")["input_ids"]
    assert (text.loss_start, targets(text, tokenizer), text.source) == (1, "héllo", "s")
    chat = one(SeedExample("s", messages=CHAT), tokenizer)
    assert chat.loss_start == 1
    assert tokenizer.decode(chat.input_ids) == "<s>[user]2+2?</s>[assistant]4</s>"


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A", "$A </s>"])
def test_prompt_and_completion_strings(single):
    tokenizer = make_tokenizer(single)
    sample = one(SeedExample("s", prompt="Q: 2+2? A:", completion=" 4 é"), tokenizer)
    bos = "<s>" if single.startswith("<s>") else ""
    assert tokenizer.decode(sample.input_ids) == f"{bos}Q: 2+2? A: 4 é</s>"
    assert targets(sample, tokenizer) == " 4 é</s>"
    assert sample.num_targets == len(" 4 é".encode()) + 1


def test_eos_in_the_data_itself(tokenizer):
    sample = one(SeedExample("s", prompt="a</s>", completion="b</s>"), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>a</s>b</s>"
    adds_eos = make_tokenizer("<s> $A </s>")
    sample = one(SeedExample("s", prompt="a</s>", completion="b"), adds_eos)
    assert adds_eos.decode(sample.input_ids) == "<s>a</s>b</s>"


def test_empty_prompt():
    with_bos = one(SeedExample("s", prompt="", completion="ab"), make_tokenizer("<s> $A </s>"))
    assert (with_bos.input_ids[0], with_bos.loss_start, with_bos.num_targets) == (0, 1, 3)
    without = one(SeedExample("s", prompt="", completion="ab"), make_tokenizer("$A"))
    assert (without.loss_start, without.num_targets) == (1, 2)  # nothing predicts the first token


def test_no_eos_token():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    sample = one(SeedExample("s", prompt="a", completion="b"), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>ab"


def test_conversational_completion_starts_after_the_generation_prompt(tokenizer):
    sample = one(SeedExample("s", prompt=CHAT[:1], completion=CHAT[1:]), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>[user]2+2?</s>[assistant]4</s>"
    assert targets(sample, tokenizer) == "4</s>"


def test_generation_prompt_that_the_answer_does_not_continue():
    template = TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    tokenizer = make_tokenizer(template=template)
    sample = one(SeedExample("s", prompt=CHAT[:1], completion=CHAT[1:]), tokenizer)
    assert targets(sample, tokenizer) == "4</s>"


# ---- what is cut ---------------------------------------------------------------------------


def test_what_was_cut_is_counted(tokenizer):
    examples = [
        SeedExample("1", text="a" * 7),  # 8 tokens with BOS: fits
        SeedExample("2", text="a" * 9),  # 10 tokens: loses 2
        SeedExample("3", text=""),  # BOS only
        SeedExample("4", prompt="p" * 4, completion="c" * 5),  # 1 + 4 + 5 + EOS: loses 3
        SeedExample("5", prompt="p" * 7, completion="c"),  # the prompt fills it
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
    }
    assert cut.summary() == (
        "Seed data: 3 samples, 17 target tokens; 2 samples cut to 8 tokens (5 tokens lost); "
        "1 sample dropped as too short; 1 sample dropped because the prompt alone fills 8 tokens."
    )


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


@pytest.mark.parametrize("sample", [0, -1, 0.0, 1.5, 500.0, float("nan"), True, "10"])
def test_impossible_sample(sample):
    with pytest.raises(UpitError, match=r"^`sample` is .*; give a fraction above 0.0 and up to 1"):
        sample_examples([SeedExample("1", text="x")], sample, 0)


# ---- errors: one sentence each, and no other exception ---------------------------------------

COLUMNS = (
    "give each record `text`, `messages` (a list of {role, content}) or `prompt` and `completion`."
)
FILES = ".jsonl, .json, .parquet or .txt"
BAD_FILES = {
    "a.jsonl": (
        b'{"text": "a"}\n\n{"text": "a" "b"}\n',
        "a.jsonl line 3 is not JSON (Expecting ',' delimiter at column 14); put one JSON object on each line.",
    ),
    "b.json": (
        b'[{"text": "a"},\n\n{"text": "b]\n',
        "b.json line 3 is not JSON (Unterminated string starting at column 10); put one JSON object on each line.",
    ),
    "c.jsonl": (b'"text"\n', f"c.jsonl line 1 is a string, not a JSON object; {COLUMNS}"),
    "d.json": (
        b'[{"text": "a"}, null]',
        f"d.json record 2 is nothing, not a JSON object; {COLUMNS}",
    ),
    "e.jsonl": (
        b'{"prompt": "a", "chosen": "b", "text": null}\n',
        f"e.jsonl line 1 has `prompt`, `chosen` and no usable column; {COLUMNS}",
    ),
    "f.jsonl": (b"{}\n", f"f.jsonl line 1 has nothing and no usable column; {COLUMNS}"),
    "g.jsonl": (
        b'{"text": ["a"]}\n',
        "g.jsonl line 1 has a list as `text`; make it a valid string.",
    ),
    "h.jsonl": (
        b'{"text": "\\ud83d"}\n',
        "h.jsonl line 1 has a broken string (half of a surrogate pair) as `text`; make it a valid string.",
    ),
    "i.jsonl": (
        b'{"messages": "hello"}\n',
        "i.jsonl line 1 has a string as `messages`; make it a list of {role, content}.",
    ),
    "j.jsonl": (
        b'{"messages": []}\n',
        "j.jsonl line 1 has an empty list as `messages`; make it a list of {role, content}.",
    ),
    "k.jsonl": (
        b'{"messages": ["hello"]}\n',
        "k.jsonl line 1 has a string as message 1 of `messages`; make it an object with `role` and `content`.",
    ),
    "l.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}\n',
        "l.jsonl line 1 has nothing as `role` of message 2 of `messages`; make it a valid string.",
    ),
    "m.jsonl": (
        b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
        "m.jsonl line 1 has a string as `prompt` and a list as `completion`; make both strings, or "
        "both lists of {role, content}.",
    ),
    "n.jsonl": (
        b'{"prompt": 1, "completion": "b"}\n',
        "n.jsonl line 1 has a number as `prompt`; make it a valid string.",
    ),
    "o.txt": (
        b"ok\ncaf\xe9\n",
        "o.txt line 2 is not UTF-8 text (byte 0xe9 at column 4); save the file as UTF-8.",
    ),
    "p.csv": (b"text\na\n", f"p.csv has the extension .csv; give seed data as a {FILES} file."),
    "q": (b"text\n", f"q has no extension; give seed data as a {FILES} file."),
    **{
        f"empty{extension}": (content, f"empty{extension} is empty; put at least one sample in it.")
        for extension, content in [
            (".jsonl", b"\n \n"),
            (".json", b"[]"),
            (".txt", b""),
            (".parquet", b""),
        ]
    },
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    content, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpitError) as caught:
        read_seed_data(name)
    assert caught.value.message == sentence


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"text": ' + b"9" * 5000 + b"}"])
def test_json_that_the_parser_itself_refuses(tmp_path, content):
    (tmp_path / "seed.jsonl").write_bytes(content)
    with pytest.raises(UpitError, match=r"^seed.jsonl line 1 (is not JSON|has a number) ?.*\.$"):
        read_seed_data("seed.jsonl")


def test_bad_parquet(tmp_path):
    path = tmp_path / "seed.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(UpitError) as caught:
        read_seed_data("seed.parquet")
    assert caught.value.message == (
        f"seed.parquet has `question`, `answer` and no usable column; {COLUMNS}"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b"], "binary")}), path)
    with pytest.raises(UpitError, match=r"^seed.parquet row 1 has binary data as `text`; make it"):
        read_seed_data("seed.parquet")
    latin1 = pyarrow.array([b"caf\xe9"], "binary").view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": latin1}), path)
    with pytest.raises(UpitError, match=r"^seed.parquet is not readable parquet \('utf-8' codec"):
        read_seed_data("seed.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 500]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UpitError, match=r"^seed.parquet is not readable parquet \(.*\); write it"):
        read_seed_data("seed.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    with pytest.raises(UpitError, match=r"^seed.parquet is empty; put at least one sample in it.$"):
        read_seed_data("seed.parquet")


@pytest.mark.parametrize(
    "source", ["", "seed.jsonl", "data/seed.parquet", "./data", "/no/such", "~/no"]
)
def test_nothing_there(source):
    with pytest.raises(UpitError) as caught:
        read_seed_data(source)
    assert caught.value.message == (
        f"There is no seed data at {source!r}; give the path of a {FILES} file or of a folder of "
        "them, or a dataset id."
    )


def test_folder_without_seed_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.md").write_text("hello")
    with pytest.raises(UpitError) as caught:
        read_seed_data("data")
    assert caught.value.message == (
        f"The folder data holds no {FILES} file; put the seed data there."
    )


def test_unreadable_file(tmp_path):
    (tmp_path / "data/a.jsonl").mkdir(parents=True)
    with pytest.raises(UpitError) as caught:
        read_seed_data("data")
    assert caught.value.message == (
        "data/a.jsonl cannot be read (Is a directory); check the file's rights."
    )


def test_dataset_id_offline_and_not_cached():
    # Its own process: huggingface_hub reads HF_HUB_OFFLINE once, at import.
    code = "from upit_merge.data.examples import *\nread_seed_data('nobody/no-such-dataset')"
    code = f"import os; os.environ['HF_HUB_OFFLINE'] = '1'\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"upit_merge.errors.UpitError: 'nobody/no-such-dataset' is no file or folder here, and "
        r"could not be loaded as a dataset from the Hub \(.*nobody/no-such-dataset.*\); give the "
        rf"path of a {FILES} file, or load the dataset once while online, so that it is in the "
        r"local cache\.",
        last,
    )


def test_dataset_that_does_not_load(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ValueError("Unknown split \"train\". Should be one of ['test'].\nMore.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UpitError) as caught:
        read_seed_data("org/name")
    assert caught.value.message == (
        "'org/name' is no file or folder here, and could not be loaded as a dataset from the Hub "
        f"(Unknown split \"train\". Should be one of ['test']); give the path of a {FILES} file, or "
        "check the dataset's id, its config and that it has the split 'train'."
    )


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"question": ["a"]},
            f"The dataset org/name has `question` and no usable column; {COLUMNS}",
        ),
        ({"text": []}, "The dataset org/name has no rows in 'train'; choose another split."),
        ({"text": [1]}, "org/name train row 1 has a number as `text`; make it a valid string."),
    ],
)
def test_dataset_without_usable_rows(monkeypatch, columns, sentence):
    import datasets

    dataset = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    with pytest.raises(UpitError) as caught:
        read_seed_data("org/name")
    assert caught.value.message == sentence


def test_no_chat_template():
    tokenizer = make_tokenizer()
    for example in (
        SeedExample("seed.jsonl line 3", messages=CHAT),
        SeedExample("seed.jsonl line 3", prompt=CHAT[:1], completion=CHAT[1:]),
    ):
        with pytest.raises(UpitError) as caught:
            tokenize_seed_data([example], tokenizer, **BIG)
        assert caught.value.message == (
            "seed.jsonl line 3 is a conversation, but the tokenizer has no chat template; use a "
            "`text` column, or set `chat_template` in the recipe."
        )


def test_conversation_that_the_template_refuses():
    tokenizer = make_tokenizer(template="{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(UpitError) as caught:
        tokenize_seed_data([SeedExample("seed.jsonl line 3", messages=CHAT)], tokenizer, **BIG)
    assert caught.value.message == (
        "seed.jsonl line 3 does not fit the tokenizer's chat template (Roles must alternate); "
        "change the conversation, or set another `chat_template` in the recipe."
    )


def test_token_id_beyond_the_vocabulary(tokenizer):
    example = SeedExample("seed.jsonl line 3", text="a")
    (_, highest) = tokenizer("a")["input_ids"]
    assert one(example, tokenizer, vocab_size=highest + 1).input_ids == [0, highest]
    with pytest.raises(UpitError) as caught:
        one(example, tokenizer, vocab_size=highest)
    assert caught.value.message == (
        f"seed.jsonl line 3 gives the token id {highest}, but the model's vocabulary has {highest} "
        "entries (the tokenizer has 258); use the tokenizer that belongs to the checkpoints."
    )


def test_no_sample_left(tokenizer):
    examples = [SeedExample("1", text=""), SeedExample("2", prompt="pp", completion="c")]
    with pytest.raises(UpitError) as caught:
        tokenize_seed_data(examples, tokenizer, max_length=3, context=64, vocab_size=258)
    assert caught.value.message == (
        "No seed sample is left (1 sample dropped as too short; 1 sample dropped because the "
        "prompt alone fills 3 tokens); give longer samples or raise `max_length`."
    )
    with pytest.raises(UpitError, match=r"\(there was none to begin with\)"):
        tokenize_seed_data([], tokenizer, **BIG)
    with pytest.raises(UpitError, match=r"^`max_length` is 1; give 2 or more"):
        tokenize_seed_data(examples, tokenizer, max_length=1, context=64, vocab_size=258)


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
