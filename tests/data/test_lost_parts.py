"""Parts of records that would be easily lost, and are not: systems, JSON in JSON, others' roles."""

from __future__ import annotations

import json

from upit_merge.data.examples import read_seed_data


def read(tmp_path, **record):
    """The one example of a file."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (example,) = read_seed_data(str(path))
    return example


ASKED, TOLD = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_a_column_for_the_system_is_not_lost(tmp_path) -> None:
    example = read(tmp_path, messages=[ASKED, TOLD], system="be nice")
    assert example.messages == [{"role": "system", "content": "be nice"}, ASKED, TOLD]
    assert example.reading == "`system` and `messages` read as messages"
    own = {"role": "system", "content": "be short"}
    example = read(tmp_path, messages=[own, ASKED, TOLD], system="be nice")
    assert example.messages == [own, ASKED, TOLD]
    assert example.reading.startswith("`system` left out beside the system's message")


def test_messages_written_as_json_in_prompt_and_completion(tmp_path) -> None:
    example = read(tmp_path, prompt=json.dumps([ASKED]), completion=json.dumps([TOLD]))
    assert (example.prompt, example.completion) == ([ASKED], [TOLD])
    plain = read(tmp_path, prompt="[1, 2]", completion="[3]")
    assert (plain.prompt, plain.completion, plain.reading) == ("[1, 2]", "[3]", None)


def test_sharegpt_roles_in_messages(tmp_path) -> None:
    rows = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]
    example = read(tmp_path, messages=rows)
    assert example.messages == [ASKED, TOLD]
    assert example.reading
    assert read(tmp_path, messages=[ASKED, TOLD]).reading is None
