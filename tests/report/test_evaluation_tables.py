"""A mixture beside other models: the table, the verdict, and what is read of older reports."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from tests.support.cards import described, evaluation, model, render
from upit_merge.report.evaluation_record import Evaluation, with_earlier_others
from upit_merge.report.evaluation_tables import compared_models, terminal_comparison
from upit_merge.report.verdict import evaluation_verdict, hardly_used_sentence

VERDICT = "Worth it: the mixture has a perplexity 9.1% ± 1.0% lower than the average."


def rival(kind: str, name: str, perplexity: float | None, **more: Any) -> dict[str, Any]:
    groups = {
        group: {"perplexity": perplexity, "gain": 0.1, "error": 0.01, "samples": 4}
        for group in ("letters", "digits")
    }
    return {"kind": kind, "name": name, "perplexity": perplexity, "groups": groups, **more}


def judged(**worth: Any) -> dict[str, Any]:
    rivals = [
        rival("single", "checkpoint 1", 4.5, gain=0.1, error=0.02, samples=4),
        rival("sum", "base + 0.7 of the sum", 4.25, gain=0.06, error=0.01, samples=2),
        rival("average", "not_measured", None),
        rival("random", "random gates", 3.75, gain=-0.06, error=None, samples=4),
    ]
    found = {"outcome": "worth", "verdict": VERDICT, "rivals": rivals, **worth}
    return {**evaluation(4), "worth": found}


def on_the_terminal(document: dict[str, Any], width: int = 200) -> list[list[str]]:
    """The cells of the table, bold ones in asterisks."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard")
    console.print(terminal_comparison(Evaluation.model_validate(document)))
    text = re.sub(r"\x1b\[1m(.*?)\x1b\[0m", r"**\1**", file.getvalue())
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def on_the_card(document: dict[str, Any]) -> list[list[str]]:
    section = render(model(evaluation=document), "").partition("## Evaluation")[2]
    first = section.partition("\n| model ")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line[2:-2].split(" | ")] for line in first]


def test_card_and_terminal_have_the_same_rows_and_the_same_bold() -> None:
    def packed(rows: list[list[str]]) -> list[list[str]]:
        # On the terminal the blanks that align a cell are bold with it.
        return [[re.sub(r"\*\* *([^*]*?) *\*\*", r"**\1**", cell) for cell in row] for row in rows]

    document = judged()
    assert packed(on_the_terminal(document)) == on_the_card(document)


def test_of_a_column_the_least_is_bold_and_no_margin_is() -> None:
    rows = {row[0]: row[1:] for row in on_the_card(judged())}
    assert rows["random gates"] == ["**3.75**"] * 3 + ["6.2% higher"]
    assert rows["this mixture"][:3] == ["4.00"] * 3
    assert rows["checkpoint 1"] == ["4.50"] * 3 + ["9.5% ± 1.8% lower"]
    bold = [cell for row in rows.values() for cell in row if "**" in cell]
    assert bold == ["**3.75**"] * 3


def test_a_rival_judged_on_a_part_says_on_how_much() -> None:
    rows = {row[0]: row for row in on_the_card(judged())}
    assert rows["base + 0.7 of the sum"][-1] == "5.8% ± 0.9% lower (2 samples)"


def test_a_column_of_margins_is_there_only_if_there_are_any() -> None:
    document = evaluation(4)
    assert all(len(row) == 4 for row in on_the_terminal(document))
    assert all(len(row) == 5 for row in on_the_terminal(judged()))


def test_the_routing_table_of_the_card_has_no_bold() -> None:
    assert "**" not in "".join(re.findall(r"\| [0-9.]+%.*", render(model(evaluation=judged()), "")))


def test_the_verdict_is_said_once_and_the_same_on_the_card() -> None:
    reason = "The checkpoints cannot be opened here."
    document = judged(left_out=reason)
    card = render(model(evaluation=document), "")
    assert card.count(VERDICT) == 1
    assert f"{VERDICT} {reason}" in card
    assert evaluation_verdict(Evaluation.model_validate(document)) == f"{VERDICT} {reason}"


def test_names_in_the_verdict_mean_nothing_on_a_card() -> None:
    document = judged(verdict="Not worth it: use **[a](b)** instead.", left_out="<b>x</b>")
    card = render(model(evaluation=document), "")
    assert "use \\*\\*\\[a\\](b)\\*\\* instead. \\<b\\>x\\</b\\>" in card
    # On the terminal they are as they are.
    assert "**[a](b)**" in evaluation_verdict(Evaluation.model_validate(document))


def test_the_recipe_of_what_is_to_be_used_has_no_path_of_anybodys_disk() -> None:
    recipe = "merge_method: linear\nmodels:\n- model: /home/anna/run/checkpoint-5\n"
    card = render(model(evaluation=judged(outcome="not_worth", recipe=recipe)), "")
    section = card.partition("## Evaluation")[2]
    assert "merge_method: linear\nmodels:\n- model: ./checkpoint-5\n```" in section
    assert "anna" not in card


@pytest.mark.parametrize(
    "older",
    [
        {},
        {"others": [{"model": "dense", "perplexity": 3.0}]},
        {"others": [{"model": "dense", "perplexity": 3.0, "groups": {"digits": 2.0}}]},
        {"worth": None, "hardly_used": None, "something": "later"},
    ],
)
def test_reports_without_a_verdict_are_read_and_shown(older: dict[str, Any]) -> None:
    document = {**evaluation(4), **older}
    found = described(model(evaluation=document)).evaluation
    assert found is not None
    assert found.worth is None
    card = render(model(evaluation=document), "")
    assert "was not measured: `upit-merge evaluate` compares it" in card
    told = 'Of the models that were measured on the same text before, "dense" has a lower'
    assert (told in card) == ("others" in older)
    assert compared_models(found)[0].name == "this mixture"


def test_a_verdict_that_is_not_one_is_no_report_of_this_version() -> None:
    for broken in ({"outcome": "worth"}, {"outcome": 3, "verdict": ""}, "worth"):
        document = model(evaluation={**evaluation(4), "worth": broken})
        with pytest.raises((AssertionError, ValueError)):
            described(document)


def test_models_measured_before_stay_only_beside_the_same_text() -> None:
    old, new = {"model": "old", "perplexity": 3.0}, {"model": "new", "perplexity": 5.0}
    again = {"model": "old", "perplexity": 3.5}
    earlier = {"samples_sha256": "a", "others": [old]}
    same = with_earlier_others(earlier, {"samples_sha256": "a", "others": [new]})
    assert same["others"] == [old, new]
    replaced = with_earlier_others(earlier, {"samples_sha256": "a", "others": [again]})
    assert replaced["others"] == [again]
    other = {"samples_sha256": "b", "others": [new]}
    assert with_earlier_others(earlier, other) == other


def test_the_verdict_knows_of_a_better_model_of_an_earlier_call() -> None:
    document = {**judged(), "others": [{"model": "dense", "perplexity": 3.0}]}
    told = evaluation_verdict(Evaluation.model_validate(document))
    assert told.startswith(VERDICT)
    assert '"dense" has a lower perplexity' in told
    # One that the verdict was made with is not told of twice.
    rivals = [*document["worth"]["rivals"], rival("other", "dense", 3.0)]
    both = {**document, "worth": {**document["worth"], "rivals": rivals}}
    assert evaluation_verdict(Evaluation.model_validate(both)) == VERDICT


@pytest.mark.parametrize(
    ("experts", "taken", "words"),
    [
        ([2], 3_400_000, "The gates hardly use expert 2 (less than a tenth of an even share of t"),
        ([2, 3], 2_000_000_000, "The gates hardly use experts 2\u20133 (less than a tenth"),
    ],
)
def test_experts_that_are_hardly_used_are_named_with_their_bytes(
    experts: list[int], taken: int, words: str
) -> None:
    document = {**evaluation(4), "hardly_used": {"experts": experts, "bytes": taken}}
    told = hardly_used_sentence(Evaluation.model_validate(document), "out/", "--data seed.jsonl")
    assert told.startswith(words)
    size = "3.4 MB" if taken < 1e9 else "2 GB"
    left = 4 - len(experts)
    assert f"would save {size} (`upit-merge shrink out/ --experts {left} --how drop" in told
    assert told.endswith("--data seed.jsonl`).")
    assert f"dropping {'it' if len(experts) == 1 else 'them'} would save" in told
    assert words in render(model(evaluation=document), "")
    assert hardly_used_sentence(Evaluation.model_validate(evaluation(4))) == ""
