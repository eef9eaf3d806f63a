"""What is shown of an answer: the experts that its tokens took, and two answers side by side."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.talk import session, user
from upit_merge.commands.compare import Rival
from upit_merge.errors import printable
from upit_merge.report.spoken import Screen


def test_shares_are_transformers_own(talker: Path) -> None:
    """Of the tokens of the answer, by the logits that transformers gives for the whole."""
    talked, shown = session(talker)
    talked.say("hello")
    answer = talked._last
    assert answer is not None
    shown.truncate(shown.seek(0))
    talked.command("experts layers")
    tokenizer = AutoTokenizer.from_pretrained(talker)
    text = tokenizer.apply_chat_template(
        [user("hello")], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(talker)
    with torch.no_grad():
        found = model(torch.tensor([[*prompt, *answer.ids]]), output_router_logits=True)
    tops = [logits[len(prompt) :].topk(2).indices for logits in found.router_logits]
    counts = torch.stack([torch.bincount(top.flatten(), minlength=4) for top in tops])
    shares = torch.stack([counts.sum(0) / counts.sum(), *(c / c.sum() for c in counts)])
    rows = [re.findall(r"[\d.]+%", line) for line in shown.getvalue().splitlines()]
    assert [row for row in rows if row] == [[f"{x:.1%}" for x in row] for row in shares.tolist()]
    # Which one weighs most in each layer is the first choice there.
    assert answer.choices is not None
    for layer, top in enumerate(tops):
        assert torch.equal(answer.choices.owners(4, layer), top[:, 0])
    weights = sum(
        torch.zeros(len(logits), 4).scatter(1, top, logits.gather(1, top).softmax(1))
        for logits, top in zip(
            [logits[len(prompt) :] for logits in found.router_logits], tops, strict=True
        )
    )
    assert isinstance(weights, torch.Tensor)
    assert torch.equal(answer.choices.owners(4), weights.argmax(1))


def test_numbers_where_there_are_no_colours(talker: Path) -> None:
    talked, shown = session(talker, show_experts=True)
    talked.say("hello")
    answer = talked._last
    assert answer is not None
    assert answer.choices is not None
    expected, before = "", None
    for piece, owner in zip(answer.pieces, answer.choices.owners(4).tolist(), strict=True):
        if piece:
            expected += f"[{owner}]" * (owner != before) + printable(piece)
            before = owner
    assert shown.getvalue().startswith(f"{expected}\n")
    assert "expert 3" in shown.getvalue()
    # As it came, so it is shown again.
    shown.truncate(shown.seek(0))
    talked.command("experts")
    assert shown.getvalue().startswith(f"{expected}\n")


def test_one_layer_and_what_its_colours_mean(talker: Path) -> None:
    """The answer by its first choices in that layer, and the layer's shares below."""
    talked, shown = session(talker)
    talked.say("hello")
    choices = talked._last.choices
    for layer in (0, 1):
        shown.truncate(shown.seek(0))
        talked.command(f"experts {layer}")
        told = shown.getvalue()
        owners = choices.experts[layer, :, 0].tolist()
        changes = [b for a, b in itertools.pairwise([None, *owners]) if a != b]
        answer, _, table = told.partition("\n")
        numbers = [*map(int, re.findall(r"\[(\d)\]", answer))]
        assert numbers
        assert set(numbers) <= set(changes)
        counts = torch.bincount(choices.experts[layer].flatten(), minlength=4)
        shares = (counts / counts.sum()).tolist()
        assert re.findall(r"[\d.]+%", table) == [f"{share:.1%}" for share in shares]
        assert re.search(rf"^│ +{layer} │", table, re.MULTILINE)


def test_it_says_whether_experts_are_shown(talker: Path) -> None:
    talked, shown = session(talker)
    for how, told in (("on", "with"), ("off", "without")):
        shown.truncate(shown.seek(0))
        talked.command(f"experts {how}")
        assert shown.getvalue() == f"From now on answers are shown {told} their experts.\n"
        talked.say("hello")
        assert ("Share of" in shown.getvalue()) == (how == "on")


def test_one_expert_for_all_has_no_choices(talker: Path, caplog: pytest.LogCaptureFixture) -> None:
    talked, shown = session(talker, expert=2, show_experts=True)
    talked.say("hello")
    assert "Share of" not in shown.getvalue()
    assert [r.message for r in caplog.records if "choices" in r.message] == [
        "All tokens take expert 2, so that there are no choices to show; leave out --show-experts "
        "or --expert."
    ]
    caplog.clear()
    session(talker, expert=2)
    session(talker, show_experts=True)
    assert not any("choices" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("term", "colorterm", "no_color", "violet"),
    [
        ("xterm-256color", "truecolor", "", "38;2;127;94;201"),
        ("xterm-256color", "", "", "38;5;98"),
        ("xterm", "", "", "95"),  # bright magenta
        ("xterm-256color", "truecolor", "1", None),
        ("dumb", "", "", None),
    ],
)
def test_colours_on_a_terminal(
    talker: Path,
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    colorterm: str,
    no_color: str,
    violet: str | None,
) -> None:
    """The last of four experts has the hue of 295 degrees, as on the page."""
    for name, value in (("TERM", term), ("COLORTERM", colorterm), ("NO_COLOR", no_color)):
        monkeypatch.setenv(name, value)
    shown = io.StringIO()
    screen = Screen(shown)
    screen.console = Console(file=shown, force_terminal=True, markup=False, highlight=False)
    talked, _ = session(talker, show_experts=True, screen=screen)
    talked.say("hello")
    first = talked._last.choices.owners(4).tolist()[0]
    assert (f"[{first}]" in shown.getvalue()) == (violet is None)
    if violet is None:
        assert not re.search(r"\x1b\[[\d;]*[39]\d", shown.getvalue())
    else:
        assert re.search(rf"\x1b\[(1;)?{violet}mexpert 3", shown.getvalue())


@pytest.mark.parametrize("width", [120, 60])
def test_two_answers_stand_side_by_side_on_a_wide_terminal(
    talker: Path, talking_family: Family, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    screen = Screen(shown)
    screen.console = Console(
        file=shown, force_terminal=True, width=width, height=12, markup=False, highlight=False
    )
    rival = Rival.parse(f"base={talking_family.base}")
    talked, _ = session(
        talker, against=[rival], screen=screen, show_experts=True, max_new_tokens=80
    )
    talked.say("hello")
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.getvalue()).replace("\r", "")
    assert bool(re.search("^out: +base:", plain, re.MULTILINE)) == (width == 120)
    assert plain.rstrip().splitlines()[-1].startswith("└" if width == 120 else "")
    # At the end all of both is there.
    final = plain[plain.rindex("out:") :]
    half = slice(0, 58 if width == 120 else None)
    words = printable(talked._talks[0].messages[-1]["content"]).split()
    seen = "".join(line[half].rstrip() for line in final.splitlines())
    assert words[-1][-8:] in seen
