"""Bad seed data: one sentence each, and no other exception."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.seeds import BIG, CHAT, make_tokenizer, tokenized
from tests.support.spoilt import assert_sentence, refusal
from upit_merge.data.examples import SeedExample, read_seed_data, sample_examples
from upit_merge.data.tokens import tokenize_seed_data

COLUMNS = (
    "give each record `text`, `messages` (a list of {role, content}) or `prompt` and `completion`."
)
FILES = ".jsonl, .json, .parquet, .csv, .tsv or .txt"
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
    "p.xlsx": (b"text\na\n", f"p.xlsx has the extension .xlsx; give seed data as a {FILES} file."),
    "r.csv": (
        b"id,title\n1,a\n",
        f"r.csv has `id`, `title` and no usable column; {COLUMNS}",
    ),
    "s.csv": (
        b"text,id\na,1\nhello, world,2\n",
        "s.csv line 3 has 3 cells, but the first line names 2 columns; put texts with separators "
        "between quotation marks.",
    ),
    "t.csv": (
        b'text\n"a\nb\n',
        "t.csv line 3 is not readable as a table (unexpected end of data); write it again.",
    ),
    "u.csv": (
        b"text,text\na,b\n",
        "u.csv has two columns with the name `text`; give each its own.",
    ),
    "v.csv": (
        b"text,id\n,1\n",
        f"v.csv line 2 has `id` and no usable column; {COLUMNS}",
    ),
    "w.csv": (
        b"text\ncaf\xe9\n",
        "w.csv line 2 is not UTF-8 text (byte 0xe9 at column 4); save the file as UTF-8.",
    ),
    "x.csv": (b"text,id\n", "x.csv is empty; put at least one sample in it."),
    "q": (b"text\n", f"q has no extension; give seed data as a {FILES} file."),
    **{
        f"empty{extension}": (content, f"empty{extension} is empty; put at least one sample in it.")
        for extension, content in [
            (".jsonl", b"\n \n"),
            (".json", b"[]"),
            (".txt", b""),
            (".csv", b""),
            (".parquet", b""),
        ]
    },
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert refusal(read_seed_data, name) == sentence


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"text": ' + b"9" * 5000 + b"}"])
def test_json_that_the_parser_itself_refuses(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seed.jsonl").write_bytes(content)
    message = refusal(read_seed_data, "seed.jsonl")
    assert re.match(r"seed.jsonl line 1 (is not JSON|has a number) ?.*\.$", message)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"question": ["a"], "answers": ["b"]},
            f"seed.parquet has `question`, `answers` and no usable column; {COLUMNS}",
        ),
        (
            {"text": pyarrow.array(["a", "b"], "binary")},
            "seed.parquet row 1 has binary data as `text`; make it…",
        ),
        (
            {"text": pyarrow.array([b"caf\xe9"], "binary").view("string")},
            "seed.parquet is not readable parquet ('utf-8' codec…",
        ),
        (
            {"text": pyarrow.array([], "string")},
            "seed.parquet is empty; put at least one sample in it.",
        ),
    ],
    ids=["other columns", "binary", "latin-1", "empty"],
)
def test_bad_parquet(tmp_path: Path, columns: Any, sentence: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "seed.parquet")
    assert_sentence(refusal(read_seed_data, "seed.parquet"), sentence)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "seed.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 500]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    sentence = "seed.parquet is not readable parquet (…); write it…"
    assert_sentence(refusal(read_seed_data, "seed.parquet"), sentence)


@pytest.mark.parametrize(
    "source", ["", "seed.jsonl", "data/seed.parquet", "./data", "/no/such", "~/no"]
)
def test_nothing_there(source: str) -> None:
    assert refusal(read_seed_data, source) == (
        f"There is no data at {source!r}; give the path of a {FILES} file or of a folder of "
        "them, or a dataset id."
    )


def test_folder_without_seed_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.md").write_text("hello")
    assert refusal(read_seed_data, "data") == (
        f"The folder data holds no {FILES} file; put the seed data there."
    )


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "data/a.jsonl").mkdir(parents=True)
    assert refusal(read_seed_data, "data") == (
        "data/a.jsonl cannot be read (Is a directory); check the file's rights."
    )


# ---- datasets ------------------------------------------------------------------------------


def test_dataset_id_offline_and_not_cached() -> None:
    # Its own process: huggingface_hub reads HF_HUB_OFFLINE once, at import.
    code = "from upit_merge.data.examples import *\nread_seed_data('nobody/no-such-dataset')"
    code = f"import os; os.environ['HF_HUB_OFFLINE'] = '1'\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert_sentence(
        done.stderr.strip().splitlines()[-1],
        "upit_merge.errors.UpitError: 'nobody/no-such-dataset' is no file or folder here, and "
        "could not be loaded as a dataset from the Hub (…nobody/no-such-dataset…); give the path "
        f"of a {FILES} file, or load the dataset once while online, so that it is in the local "
        "cache.",
    )


def test_dataset_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Unknown split \"train\". Should be one of ['test'].\nMore.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal(read_seed_data, "org/name") == (
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
def test_dataset_without_usable_rows(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], sentence: str
) -> None:
    dataset = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    assert refusal(read_seed_data, "org/name") == sentence


# ---- samples and tokens --------------------------------------------------------------------


@pytest.mark.parametrize("sample", [0, -1, 0.0, 1.5, 500.0, float("nan"), True, "10"])
def test_impossible_sample(sample: Any) -> None:
    message = refusal(sample_examples, [SeedExample("1", text="x")], sample, 0)
    assert_sentence(message, "`sample` is …; give a fraction above 0.0 and up to 1…")


@pytest.mark.parametrize(
    "example",
    [
        SeedExample("seed.jsonl line 3", messages=CHAT),
        SeedExample("seed.jsonl line 3", prompt=CHAT[:1], completion=CHAT[1:]),
    ],
)
def test_no_chat_template(example: SeedExample) -> None:
    assert refusal(tokenize_seed_data, [example], make_tokenizer(), **BIG) == (
        "seed.jsonl line 3 is a conversation, but the tokenizer has no chat template; use a "
        "`text` column, or set `chat_template` in the recipe."
    )


def test_conversation_that_the_template_refuses() -> None:
    tokenizer = make_tokenizer(template="{{ raise_exception('Roles must alternate.') }}")
    examples = [SeedExample("seed.jsonl line 3", messages=CHAT)]
    assert refusal(tokenize_seed_data, examples, tokenizer, **BIG) == (
        "seed.jsonl line 3 does not fit the tokenizer's chat template (Roles must alternate); "
        "change the conversation, or set another `chat_template` in the recipe."
    )


def test_token_id_beyond_the_vocabulary(tokenizer: Any) -> None:
    example = SeedExample("seed.jsonl line 3", text="a")
    (_, highest) = tokenizer("a")["input_ids"]
    assert tokenized(example, tokenizer, vocab_size=highest + 1).input_ids == [0, highest]
    assert refusal(tokenized, example, tokenizer, vocab_size=highest) == (
        f"seed.jsonl line 3 gives the token id {highest}, but the model's vocabulary has {highest} "
        "entries (the tokenizer has 258); use the tokenizer that belongs to the checkpoints."
    )


def test_no_sample_left(tokenizer: Any) -> None:
    examples = [SeedExample("1", text=""), SeedExample("2", prompt="pp", completion="c")]
    limits = {"context": 64, "vocab_size": 258}
    assert refusal(tokenize_seed_data, examples, tokenizer, max_length=3, **limits) == (
        "No seed sample is left (1 sample dropped as too short; 1 sample dropped because the "
        "prompt alone fills 3 tokens); give longer samples or raise `max_length`."
    )
    none = refusal(tokenize_seed_data, [], tokenizer, **BIG)
    assert "(there was none to begin with)" in none
    short = refusal(tokenize_seed_data, examples, tokenizer, max_length=1, **limits)
    assert_sentence(short, "`max_length` is 1; give 2 or more…")


def test_tables_of_text_beside_other_data_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("text\nb\n")
    (tmp_path / "more.tsv").write_text("text\tkind\nc\td\n")
    assert [example.text for example in read_seed_data(".")] == ["c", "b"]
    (tmp_path / "results.csv").write_text("run,loss\n1,2\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert [example.text for example in read_seed_data(".")] == ["a"]
