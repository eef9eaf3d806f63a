"""A conversation: what is said is what transformers generates, and what is typed is done."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.commands import done, invoke
from tests.support.spoilt import refusal
from tests.support.talk import (
    TOKENS,
    assistant,
    family_that_talks,
    said_by_transformers,
    session,
    typed,
    user,
)
from upit_merge.commands.chat import HELP, chat
from upit_merge.commands.compare import Rival
from upit_merge.errors import printable
from upit_merge.report.spoken import Screen


def turns(talked: Any) -> list[dict[str, str]]:
    """The conversation with the first model."""
    return list(talked._talks[0].messages)


# ---- what is said -------------------------------------------------------------------------------


def test_answers_are_transformers_own(talker: Path) -> None:
    """Turn after turn, each of which is given all that was said; shown as it comes."""
    talked, shown = session(talker, system="be kind")
    messages = [{"role": "system", "content": "be kind"}]
    for text in ("hello", "and then?", "so"):
        messages.append(user(text))
        messages.append(assistant(said_by_transformers(talker, messages)))
        talked.say(text)
    assert turns(talked) == messages[1:]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert shown.getvalue() == "".join(f"{printable(text)}\n" for text in answers)


def test_sampling_is_transformers_own(talker: Path) -> None:
    given = {"temperature": 0.7, "top_p": 0.9}
    talked, _ = session(talker, greedy=False, seed=5, **given)
    talked.say("hello")
    torch.manual_seed(5)
    expected = said_by_transformers(talker, [user("hello")], do_sample=True, **given)
    assert turns(talked)[-1]["content"] == expected
    again, _ = session(talker, greedy=False, seed=6, **given)
    again.say("hello")
    assert turns(again)[-1]["content"] != expected


def test_the_model_s_own_settings_count_unless_options_say_otherwise(talker: Path) -> None:
    own = {"do_sample": True, "temperature": 3.0, "top_k": 9, "max_new_tokens": 7}
    # What the likeliest answer begins with ends it: a list, of which the second counts.
    first, *_ = said_by_transformers(talker, [user("hello")], max_new_tokens=40)
    (number,) = AutoTokenizer.from_pretrained(talker)(first, add_special_tokens=False)["input_ids"]
    (talker / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [1, 0]}))
    talked, _ = session(talker, greedy=False, seed=1, max_new_tokens=None)
    talked.say("hello")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(talker)
    expected = said_by_transformers(talker, [user("hello")], model, **own, eos_token_id=[1, 0])
    assert turns(talked)[-1]["content"] == expected
    assert len(talked._last.ids) == 7
    (talker / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [0, number]}))
    talked, _ = session(talker)
    talked.say("hello")
    assert talked._last.ids == []
    assert talked._last.is_complete


def test_a_tokenizer_s_end_token_ends_an_answer(talker: Path) -> None:
    """A chat format that was trained into a base model, whose settings do not know of it."""
    first, *_ = said_by_transformers(talker, [user("hello")])
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.eos_token = first
    tokenizer.save_pretrained(talker)
    talked, _ = session(talker)
    talked.say("hello")
    assert talked._last.is_complete


def test_without_a_template_the_text_is_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = family_that_talks(tmp_path, template=None, count=0).base
    talked, _ = session(plain)
    model, tokenizer = (
        kind.from_pretrained(plain) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    text = ""
    for line in ("once upon", "a time"):
        text += ("\n" if text else "") + line
        ids = tokenizer(text, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        text += tokenizer.decode(answer, skip_special_tokens=True)
        talked.say(line)
    assert "".join(m["content"] for m in turns(talked)) == text.replace("\na time", "a time")
    assert [r.message for r in caplog.records if "template" in r.message] == [
        "base has no chat template, so it continues your text as it is."
    ]


def test_every_model_has_its_own_conversation(talker: Path, talking_family: Family) -> None:
    rivals = [Rival.parse(f"the base={talking_family.base}"), Rival.parse("expert:2")]
    talked, shown = session(talker, against=rivals)
    alone, _ = session(talker, expert=2)
    for text in ("hello", "more"):
        talked.say(text)
        alone.say(text)
    expected: list[dict[str, str]] = []
    for text in ("hello", "more"):
        expected.append(user(text))
        expected.append(assistant(said_by_transformers(talking_family.base, expected)))
    assert talked._talks[1].messages == expected
    assert talked._talks[2].messages == alone._talks[0].messages
    headings = [line for line in shown.getvalue().splitlines() if line.endswith(":")]
    assert headings[:3] == ["out:", "the base:", "expert:2:"]


def test_an_adapter_answers_as_peft_s_model(talking_family: Family, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(talking_family.base)
    torch.manual_seed(0)
    settings = LoraConfig(init_lora_weights=False, target_modules=["up_proj", "down_proj"])
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    talked, _ = session(Path(f"{talking_family.base}+{tmp_path / 'adapter'}"))
    talked.say("hello")
    base = AutoModelForCausalLM.from_pretrained(talking_family.base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = said_by_transformers(talking_family.base, [user("hello")], adapted)
    assert turns(talked)[-1]["content"] == expected
    assert expected != said_by_transformers(talking_family.base, [user("hello")])


def test_a_mixture_that_transformers_has_saved(talker: Path, tmp_path: Path) -> None:
    """Its experts are in fused tensors, under other names."""
    model = AutoModelForCausalLM.from_pretrained(talker)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    AutoTokenizer.from_pretrained(talker).save_pretrained(tmp_path / "saved")
    talked, _ = session(tmp_path / "saved", show_experts=True)
    talked.say("hello")
    assert turns(talked)[-1]["content"] == said_by_transformers(talker, [user("hello")])


def test_models_of_the_same_name_are_told_apart(talker: Path, tmp_path: Path) -> None:
    """By all that was given: of a/out and b/out the last part says nothing."""
    other = tmp_path / "another" / talker.name
    shutil.copytree(talker, other)
    talked, shown = session(talker, against=[Rival.parse(str(other))])
    talked.say("hello")
    headings = [line for line in shown.getvalue().splitlines() if line.endswith(":")]
    assert headings == [f"{talker}:", f"{other}:"]
    for again in (str(talker), f"{talker.name}={talker}"):
        assert refusal(session, talker, against=[Rival.parse(again)]) == (
            f"Two models to compare with are called {talker}; give names: --against NAME=MODEL."
        )
    named, _ = session(talker, against=[Rival.parse(f"the same={talker}")])
    assert [talk.voice.name for talk in named._talks] == ["out", "the same"]


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_nan_is_no_number(talker: Path, option: str) -> None:
    result = invoke("chat", talker, "--prompt", "hello", option, "nan")
    assert result.stderr == "Error: --temperature and --top-p take numbers, and nan is none.\n"


# ---- what is too long, or stopped ---------------------------------------------------------------


def test_the_oldest_turns_go_when_the_context_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = family_that_talks(tmp_path, count=0, max_position_embeddings=128).base
    talked, _ = session(base)
    for number in range(4):
        talked.say(f"{number}" * 20)
    told = [r.message for r in caplog.records if "longer" in r.message]
    assert told[0].startswith("The conversation is longer than the 128 tokens that base can read; ")
    kept = [m["content"] for m in turns(talked) if m["role"] == "user"]
    assert kept[-1] == "3" * 20
    assert "0" * 20 not in kept
    before = turns(talked)
    expected = said_by_transformers(base, before[:-1])
    assert before[-1]["content"] == expected
    message = refusal(talked.say, "x" * 200)
    assert re.fullmatch(r"The message has \d+ tokens, base can read 128; shorten it\.", message), (
        message
    )
    assert turns(talked) == before


def test_ctrl_c_stops_the_answer_and_not_the_session(talker: Path) -> None:
    """What was said until then is a part of the conversation."""

    class Pressed(Screen):
        left = 4

        def piece(self, text: str, owner: int | None = None, num_experts: int = 0) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            super().piece(text, owner, num_experts)

    shown = io.StringIO()
    talked, _ = session(talker, screen=Pressed(shown))
    talked.talk(typed("hello", KeyboardInterrupt, "more"))
    first = said_by_transformers(talker, [user("hello")])
    stopped = turns(talked)[1]["content"]
    assert first.startswith(stopped)
    assert len(stopped) < len(first)
    messages = [user("hello"), assistant(stopped), user("more")]
    assert turns(talked)[3]["content"] == said_by_transformers(talker, messages)
    assert "(stopped)" in shown.getvalue()
    assert "(/quit or Ctrl-D ends)" in shown.getvalue()


# ---- what is typed ------------------------------------------------------------------------------


def test_commands(talker: Path, tmp_path: Path) -> None:
    talked, shown = session(talker)
    saved = tmp_path / "talk.jsonl"
    lines = ["/help", "hello", "/experts", "/expert 1", "again", f"/save {saved}", "/reset"]
    talked.talk(typed(*lines, " /etc is a folder", "", "/quit", "never"))
    text = shown.getvalue()
    assert HELP.splitlines()[0] in text
    assert "Now talking to out, expert 1." in text
    assert "A new conversation." in text
    record = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["content"] for m in record["messages"]][::2] == ["hello", "again"]
    assert turns(talked)[0] == user("/etc is a folder")
    assert len(turns(talked)) == 2
    # It can be trained on.
    tokenizer = AutoTokenizer.from_pretrained(talker)
    assert "hello" in tokenizer.apply_chat_template(record["messages"], tokenize=False)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/nope\x1b[2J", "There is no command /nope\\x1b[2J; there are /help, …"),
        ("/experts", "There is no answer to show the experts of; say something first."),
        ("/expert 4", "out has the experts 0 to 3, and no expert 4; give one of these."),
        ("/expert one", "/expert takes an expert's number or off, not 'one'."),
        ("/save", "/save takes the name of a new file; write /save FILE."),
        ("/save @/new", "There is no conversation to save yet; say something first."),
    ],
)
def test_a_command_that_cannot_be_done(talker: Path, line: str, sentence: str) -> None:
    talked, shown = session(talker)
    talked.talk(typed(line.replace("@", str(talker))))
    told = shown.getvalue().splitlines()[1].replace(str(talker), "@")
    assert re.fullmatch(".*".join(map(re.escape, f"Error: {sentence}".split("…"))), told), told


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.json", "@/config.json is there already; give another name."),
        ("", "@ is there already; give another name."),
        ("no/file", "@/no/file cannot be written (No such file or directory)."),
        ("a\0b", "@/a\\x00b cannot be written (embedded null byte)."),
    ],
)
def test_files_that_cannot_be_saved(talker: Path, name: str, sentence: str) -> None:
    before = sorted(talker.iterdir())
    talked, _ = session(talker)
    talked.say("hello")
    told = refusal(talked.command, f"save {talker / name}")
    assert told.replace(str(talker), "@") == sentence
    told = refusal(talked.command, "save ~nobody-of-this-name/file")
    assert told == "~nobody-of-this-name/file cannot be written (No such file or directory)."
    assert sorted(talker.iterdir()) == before


def test_experts_of_a_layer_that_is_not_there(talker: Path) -> None:
    talked, _ = session(talker)
    talked.say("hello")
    assert refusal(talked.command, "experts 2") == (
        "/experts takes on, off, layers or a layer's number (0 to 1), not '2'."
    )
    talked.command("expert 1")
    assert refusal(talked.command, "experts") == "All tokens take expert 1; /expert off ends that."


def test_a_dense_model_is_talked_to_as_well(talking_family: Family) -> None:
    talked, _ = session(talking_family.base)
    talked.say("hello")
    assert turns(talked)[-1]["content"] == said_by_transformers(
        talking_family.base, [user("hello")]
    )
    sentence = (
        "base has no experts that can be told apart here: it is a dense model, or a mixture in "
        "none of the formats of docs/families.md; leave the expert out."
    )
    for line in ("experts", "expert 0", "experts on"):
        assert refusal(talked.command, line) == sentence


# ---- the command line ---------------------------------------------------------------------------


def test_prompts_are_answered_and_nothing_else_is_printed(talker: Path) -> None:
    words = [
        "chat",
        talker,
        "--prompt",
        "hello",
        "--prompt",
        "/help",
        "--greedy",
        "--max-new-tokens",
    ]
    result = done(*words, TOKENS)
    messages = [user("hello")]
    first = said_by_transformers(talker, messages)
    second = said_by_transformers(talker, [*messages, assistant(first), user("/help")])
    assert result.stdout == f"{printable(first)}\n{printable(second)}\n"
    assert result.stderr == ""


def test_lines_of_a_pipe_are_said_in_turn(talker: Path) -> None:
    from click.testing import CliRunner

    from upit_merge.cli.main import main

    words = ["chat", str(talker), "--greedy", "--max-new-tokens", str(TOKENS)]
    result = CliRunner().invoke(main, words, input="hello\n\n/experts layers\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    said = said_by_transformers(talker, [user("hello")])
    assert result.stdout.startswith(f"{printable(said)}\n")
    assert "expert 3" in result.stdout
    failed = CliRunner().invoke(main, words, input="/nope\n")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("Error: There is no command /nope;")


def test_nothing_to_say(talker: Path) -> None:
    result = invoke("chat", talker)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Nothing was said: standard input, which is no terminal, has no line; give "
        "--prompt.\n"
    )


def test_the_end_of_a_session_says_what_is_next(talker: Path) -> None:
    from upit_merge.commands.chat import ChatOptions

    shown = io.StringIO()
    options = ChatOptions(max_new_tokens=3, device="cpu")
    chat(str(talker), options, Screen(shown, width=999), read=typed("hello"))
    assert f"  upit-merge evaluate {talker} --data HELD-OUT-DATA" in shown.getvalue()


def test_bytes_that_are_no_text(talker: Path) -> None:
    """In what is piped in, and where the output knows no more than ASCII."""
    from click.testing import CliRunner

    from upit_merge.cli.main import main

    words = ["chat", str(talker), "--greedy", "--max-new-tokens", str(TOKENS)]
    for text, options in ((b"caf\xe9\n", {}), (b"hello\n", {"charset": "ascii"})):
        result = CliRunner(**options).invoke(main, words, input=text)  # type: ignore[arg-type]
        assert result.exit_code == 0, result.output
