"""`upit-merge evaluate` beside the dense models that one could have in the mixture's place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family
from tests.support.commands import done
from tests.support.seeds import held_out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return held_out(tmp_path)


def evaluated(out: Path, data: Path, *words: object) -> tuple[dict[str, Any], str]:
    """What JSON has and the terminal shows."""
    file = out.parent / "numbers.json"
    said = done("evaluate", out, "--data", data, "--json", file, *words).stdout
    return json.loads(file.read_text()), said


def rivals_of(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {rival["kind"]: rival for rival in numbers["worth"]["rivals"]}


def perplexity_of_average(folders: list[Path], data: Path) -> float:
    """That of the really averaged model, by transformers, one sample at a time."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    states = [model.state_dict() for model in models]
    averaged = {name: torch.stack([s[name].float() for s in states]).mean(0) for name in states[0]}
    models[0].load_state_dict(averaged)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            total += models[0](ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def test_the_average_is_that_of_the_checkpoints(moe: Path, four: Family, data: Path) -> None:
    numbers, said = evaluated(moe, data)
    rivals = rivals_of(numbers)
    assert {"single", "average", "random"} <= rivals.keys()
    expected = perplexity_of_average(four.checkpoints[:3], data)
    assert rivals["average"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert all(rival["samples"] == 20 for rival in rivals.values())
    assert " ".join(numbers["worth"]["verdict"].split()) in " ".join(said.split())


def test_card_and_terminal_say_the_same_and_nothing_is_computed_again(
    moe: Path, data: Path
) -> None:
    numbers, first = evaluated(moe, data)
    again, said = evaluated(moe, data, "--card")
    assert again == numbers
    assert "nothing of it was computed" in said
    card = (moe / "README.md").read_text()
    for text in (card.replace("\\", ""), first, said):
        assert " ".join(text.split()).count(numbers["worth"]["verdict"]) == 1
    for rival in numbers["worth"]["rivals"]:
        assert f"{rival['perplexity']:.2f}" in card
        assert f"{rival['perplexity']:.2f}" in said
    table = card.partition("| this mixture |")
    rows = (table[1] + table[2].partition("\n\n")[0]).splitlines()
    bold = [float(cell) for row in rows for cell in re.findall(r"\*\*([\d.]+)\*\*", row)]
    values = [numbers["worth"]["perplexity"]]
    values += [rival["perplexity"] for rival in numbers["worth"]["rivals"]]
    assert bold
    assert set(bold) == {float(f"{min(values):.2f}")}


def test_without_the_checkpoints_its_own_experts_are_what_there_is(moe: Path, data: Path) -> None:
    recipe = moe / "mergekit_config.yml"
    recipe.write_text(
        re.sub(r"(model: |base_model: )\S+", r"\1/nowhere/at-all", recipe.read_text())
    )
    numbers, said = evaluated(moe, data)
    rivals = rivals_of(numbers)
    assert rivals.keys() == {"single", "average", "random"}
    assert rivals["average"]["name"] == "the average of its experts"
    assert rivals["single"]["name"].startswith("expert ")
    reason = numbers["worth"]["left_out"]
    assert "cannot be opened here" in reason
    assert "--against MODEL" in reason
    assert " ".join(reason.split()) in " ".join(said.split())


def test_a_mixture_trained_further_has_no_rivals_of_fewer_tokens(moe: Path, data: Path) -> None:
    path = moe / "upit_report.json"
    report = json.loads(path.read_text())
    report["post_training"] = {
        "settings": {"train_modules": "all"},
        "data": "sft",
        "samples": 12,
        "tokens": 300,
        "steps": 7,
        "seconds": 1.0,
        "history": [],
    }
    path.write_text(json.dumps(report))
    numbers, _said = evaluated(moe, data)
    assert "saw fewer tokens" in numbers["worth"]["left_out"]
    assert rivals_of(numbers)["average"]["name"] == "the average of its experts"


def test_a_mixture_without_a_report(moe: Path, data: Path) -> None:
    (moe / "upit_report.json").unlink()
    numbers, _said = evaluated(moe, data)
    assert "there is no report" in numbers["worth"]["left_out"]
    assert "sum" not in rivals_of(numbers)


def test_they_can_be_left_out(moe: Path, data: Path) -> None:
    numbers, said = evaluated(moe, data, "--no-rivals")
    assert "worth" not in numbers
    assert "Whether the mixture is worth its bytes was not measured" in " ".join(said.split())


def test_other_checkpoints_on_the_same_path_are_not_taken_for_them(
    moe: Path, four: Family, data: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(four.root, copies, ignore=shutil.ignore_patterns("out*"))
    recipe = moe / "mergekit_config.yml"
    for path in (recipe, moe / "upit_report.json"):
        path.write_text(path.read_text().replace(str(four.root), str(copies)))
    before, _said = evaluated(moe, data)
    assert "left_out" not in before["worth"]
    first, last = (copies / four.checkpoints[i].relative_to(four.root) for i in (0, -1))
    shutil.rmtree(first)
    shutil.copytree(last, first)
    after, _said = evaluated(moe, data)
    assert "not those that it was made from" in after["worth"]["left_out"]
