"""What commands name under `Next:` can be typed as it stands, and is not done already."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY, Family, build_family, byte_tokenizer
from tests.support.commands import done, refused
from tests.support.seeds import held_out
from upit_merge.commands.chat import ChatOptions, chat
from upit_merge.errors import argument
from upit_merge.report.next_steps import steps_after_plan
from upit_merge.report.spoken import Screen


def steps(*words: object) -> dict[str, str]:
    """Run a command and return what it names next: command lines by what they are for."""
    lines = done(*words).stdout.splitlines()
    told = lines[lines.index("Next:") + 1 :]
    parts = [re.fullmatch(r"  (\S.*?) +(upit-merge .*)", line) for line in told]
    return {part[1]: part[2] for part in parts}


def typed(line: str, **stands_for: object) -> dict[str, str] | None:
    """Type a line, with something for each stand-in; it must succeed."""
    words = shlex.split(line)[1:]
    found = [str(stands_for.get(word.replace("-", "_"), word)) for word in words]
    assert not [w for w in found if w in ("N", "OTHER", "HELD-OUT-DATA", "SEED-DATA")], line
    if found[0] == "chat":
        found += ["--prompt", "ab"]
    return done(*found).stdout


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Beside which everything is written."""
    monkeypatch.chdir(tmp_path)
    return held_out(tmp_path)


def test_of_plan_run_and_router(family: Family, data: Path) -> None:
    recipe = family.write_recipe(family.recipe())
    Path("out").mkdir()
    Path("out/something.txt").write_text("")  # another model, say
    (line,) = steps("plan", recipe).values()
    assert line.endswith(" out-2/")
    typed(line)
    after_run = steps("run", recipe, "out-2")  # which was done: it says the same as before
    assert list(after_run) == ["train the gates, which are random", "measure it", "talk to it"]
    for line in after_run.values():
        typed(line, HELD_OUT_DATA=data, SEED_DATA=family.seed_file())
    for line in steps("router", "out-2", "--data", family.seed_file(30)).values():
        typed(line, HELD_OUT_DATA=data)


def test_of_commands_that_change_a_mixture(moe: Path, four: Family, data: Path) -> None:
    seeds = four.seed_file()
    grown = steps("extend", moe, "--model", four.checkpoints[-1], "--data", seeds)
    for line in grown.values():
        typed(line, HELD_OUT_DATA=data)
    words = ["--data", seeds, "--sample", "20", "--max-length", "40"]
    smaller = steps("shrink", moe, "--experts", "3", *words)
    assert "--sample 20 --max-length 40" in smaller["fit the gates anew"]
    for line in smaller.values():
        typed(line, HELD_OUT_DATA=data)
    taken = steps("extract", moe, "dense", "--expert", "0")
    typed(taken["compare the two"], HELD_OUT_DATA=data)
    typed(taken["make it an expert of another mixture"], OTHER=moe)


def test_data_that_the_report_names(family: Family, data: Path, monkeypatch) -> None:
    """Of a mixture whose gates were fitted, the seed data and what lies beside it are known."""
    monkeypatch.chdir(family.root)
    shutil.copy(data, "held-out.jsonl")
    family.seed_file()
    recipe = family.write_recipe(family.recipe(router={"data": "seed.jsonl"}))
    done("run", recipe, "out")
    line = steps("extract", "out", "dense", "--expert", "0")["compare the two"]
    assert line == "upit-merge evaluate out --data held-out.jsonl --against dense"
    screen, lines = Screen(io.StringIO()), iter(["ab", "/quit"])
    chat("out", ChatOptions(device="cpu", max_new_tokens=2), screen, read=lambda _: next(lines))
    told = screen.console.file.getvalue()
    assert "upit-merge evaluate out --data held-out.jsonl\n" in told
    assert "upit-merge router out --data seed.jsonl\n" in told


def test_what_to_plan_after_a_run(moe: Path, four: Family, caplog) -> None:
    """It is not to be replaced, and the question can be asked all the same."""
    recipe = four.write_recipe(four.recipe())
    assert "--overwrite" not in done("plan", recipe, moe).output
    assert f"{moe} holds an earlier output: `upit-merge run` leaves it as it is" in caplog.text
    (moe / "upit_report.json").unlink()
    assert "is not empty" in refused("plan", recipe, moe)


def test_of_evaluate(moe: Path, data: Path, four: Family) -> None:
    Path("mean").mkdir()
    Path("mean/notes.txt").write_text("")
    words = ["evaluate", moe, "--data", data, "--group-by", "kind", "--sample", "12", "--seed", "3"]
    beside = steps(*words, "--max-length", "20", "--no-experts")
    assert not beside.keys() & {"write the average of its experts", "measure that beside it"}
    first = steps(*words, "--max-length", "20", "--no-experts", "--no-rivals")
    assert "mean-2/" in first["write the average of its experts"]
    for line in first.values():
        said = typed(line, N=3, SEED_DATA=four.seed_file())
        if "--card" in line:
            assert "nothing of it was computed" in said
    last = steps(*words, "--max-length", "20", "--no-experts", "--no-rivals")
    assert "put this on the card" not in last
    with_card = steps(*words, "--card")
    assert "put this on the card" not in with_card
    assert "see where every token goes" in with_card


def test_of_an_evaluation_beside_others(moe: Path, data: Path, four: Family) -> None:
    rival = four.root / "a model's folder"
    if not rival.exists():
        shutil.copytree(four.base, rival)
    words = ["evaluate", moe, "--data", data, "--control", "--against", f"the base={rival}"]
    first = steps(*words)
    typed(first["put this on the card"])
    card = (moe / "README.md").read_text()
    assert "the base" in card
    assert "put this on the card" not in steps(*words)
    # Other samples are another evaluation.
    assert "put this on the card" in steps(*words, "--sample", "9")


def test_of_a_mixture_from_elsewhere(tmp_path: Path, data: Path) -> None:
    """It has no report to put anything into."""
    config = AutoConfig.for_model("mixtral", **TINY, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("foreign")
    byte_tokenizer().save_pretrained("foreign")
    found = steps("evaluate", "foreign", "--data", data, "--no-rivals")
    assert "put this on the card" not in found
    assert "write the average of its experts" in found
    for line in found.values():
        typed(line, N=3, SEED_DATA=data)


def test_no_average_that_would_be_refused(
    tmp_path: Path, data: Path, merge: Callable[..., Path]
) -> None:
    """A dense SmolLM3 has no window, as layers of this mixture have."""
    settings = {"no_rope_layers": [0, 1], "no_rope_layer_interval": 2}
    family = build_family(tmp_path / "family", kind="smollm3", **settings)
    out = merge(family.recipe(architecture="granitemoe_swa"))
    extracting = "write the average of its experts"
    assert extracting in steps("evaluate", out, "--data", data, "--no-rivals")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    assert "has a window" in refused("extract", out, tmp_path / "dense", "--average")
    found = steps("evaluate", out, "--data", data, "--no-rivals")
    assert extracting not in found
    assert "measure that beside it" not in found
    for line in found.values():
        typed(line, N=3, SEED_DATA=data)


def test_code_of_a_tokenizer_is_allowed_again(moe: Path, data: Path, four: Family) -> None:
    allowed = ["--trust-remote-code"]
    for words in (
        ["evaluate", moe, "--data", data],
        ["router", moe, "--data", data],
        ["shrink", moe, "--experts", "3", "--data", data],
    ):
        assert "--trust-remote-code" not in str(steps(*words).values())
        words[3:4] = ["2"] if words[0] == "shrink" else words[3:4]
        for line in steps(*words, *allowed, "--seed", "1").values():
            assert line.endswith(allowed[0]) or " extract " in line


def test_of_the_beginning(family: Family, data: Path) -> None:
    Path("out").mkdir()
    printed = done("split", data).stdout
    (file,) = re.findall("upit-merge evaluate out/ --data (.*)", printed)
    assert Path(file).is_file()
    words = ["--base", family.base, "--data", family.seed_file()]
    found = steps("init", family.root / "sft", *words)
    assert [line.split()[1] for line in found.values()] == ["plan", "plan", "run"]
    asking = found["see whether it is worth it"]
    assert asking.endswith(f" --data {argument(family.seed_file())}")
    for line in found.values():
        assert line is asking or line.endswith(" out-2/")
        typed(line)


def test_what_plan_says_comes_next_follows_its_verdict(family: Family, data: Path) -> None:
    seeds = family.seed_file()
    recipe = family.write_recipe(family.recipe(router={"data": str(seeds)}))
    first = steps("plan", recipe, "out/")
    assert [*first] == ["see whether it is worth it", "make it"]
    assert first["see whether it is worth it"] == f"upit-merge plan {recipe} --data {seeds}"
    few = family.seed_file(5, "few.jsonl")
    again = steps("plan", recipe, "--data", few, "--group-by", "text", "--trust-remote-code")
    asking, making = again
    assert asking.startswith("ask again with more samples, ")
    assert making == "make the mixture all the same"
    words = f"{recipe} --data {few} --group-by text --trust-remote-code"
    assert again[asking] == f"upit-merge plan {words}"


@pytest.mark.parametrize(
    ("outcome", "needed", "recipe", "first"),
    [
        ("worth", None, None, "upit-merge run R OUT"),
        ("not_worth", None, "merge_method: linear", "mergekit-yaml dense-2.yml dense/"),
        ("not_worth", None, None, "upit-merge plan R --data D"),
        ("too_few", 240, None, "upit-merge plan R --data D"),
        ("too_few", 20_000, None, "upit-merge run R OUT"),  # nobody has as many
    ],
)
def test_what_plan_advises_comes_first(outcome, needed, recipe, first, data: Path) -> None:
    Path("dense.yml").write_text("")
    worth = SimpleNamespace(outcome=outcome, needed=needed)
    found = [*steps_after_plan("R OUT", "R --data D", worth, recipe)]
    assert found[0][1] == first
    assert found[-1][1] == "upit-merge run R OUT"
    assert (found[-1][0] == "make it") == (outcome == "worth")
    assert ("about 240" in found[0][0]) == (needed == 240)
    assert ("save the recipe above as dense-2.yml" in found[0][0]) == (recipe is not None)


@pytest.mark.skipif(os.name == "nt", reason="there a backslash parts folders")
@pytest.mark.parametrize("name", ["a\\b", "a\\\\", "a b", "$HOME", "`id`", "it's", 'say "a"', "#1"])
def test_a_name_is_typed_as_it_is(name: str) -> None:
    line = f"printf %s {argument(name)}"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == name
