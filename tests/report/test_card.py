"""The model card: what it says of every kind of model, and that it can be used as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.conftest import Family, build_family
from tests.support.cards import card_of, evaluation, model, render, report_of
from tests.support.loading import load
from upit_merge.report.document import Report, describe
from upit_merge.report.markdown import amount, escaped, fenced, table, with_code


def test_no_section_without_something_to_say() -> None:
    text = render(model(1, 1), "")
    assert re.findall(r"^## (.*)", text, re.M) == ["Run it", "Experts", "Router", "Make it again"]
    assert "mergekit-yaml" not in text  # there is no recipe to give it
    assert "A mixture of 1 expert per layer, 1 of them per token, in Mixtral format" in text
    assert "46.7 B parameters, of which a token meets 12.9 B" in text


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 4), (4, 16), (4, 17), (20, 64)])
def test_cards_of_every_size(m: int, n: int) -> None:
    text = render(model(m, n), "a: 1\n")
    assert ("<details>" in text) == (n > 16)
    assert len(re.findall(r"^\| \d+ \| ", text, re.M)) == n
    assert ("| ratio |" in text) == (n > m)
    if n > m:
        assert f"| {m} | experts 0 and 1 | 0.25 : 0.75 | checkpoint-1000 75%" in text
    # Every table is one: rows as wide as their titles.
    html = MarkdownIt().enable("table").render(text.split("\n---\n", 1)[1])
    assert html.count("<table>") == text.count("\n|-") + text.count("\n|:-")
    assert "|--" not in html


def test_code_can_be_copied_and_a_chat_model_is_asked_as_one() -> None:
    report = model()
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", render(report, "a: 1\n"), re.S)
    assert [kind for kind, _ in blocks] == ["python", "bash", "bash", "yaml", "bash"]
    compile(blocks[0][1], "card", "exec")
    assert 'model="your-name/my-model"' in blocks[0][1]
    assert "/v1/completions" in blocks[1][1]
    body = re.search(r"-d '(.*)'", blocks[1][1])
    assert body is not None
    assert json.loads(body[1])["model"] == "your-name/my-model"
    report["model"]["chat_template"] = True
    chat = re.findall(r"```(\w+)\n(.*?)\n```", render(report, ""), re.S)
    compile(chat[0][1], "card", "exec")
    assert "/v1/chat/completions" in chat[1][1]
    report["model"]["tokenizer"] = False
    assert "vllm serve" not in render(report, "")


def test_the_snippet_runs(shared_family: Family, merge) -> None:
    """With the folder for the id, as the card says."""
    out = merge(shared_family.recipe())
    block = re.findall(r"```python\n(.*?)\n```", card_of(out), re.S)[0]
    block = block.replace("your-name/out", str(out)).replace(
        "max_new_tokens=100", "max_new_tokens=3"
    )
    printed: list[str] = []
    exec(block, {"print": printed.append})
    assert printed[0].startswith("The sky is")


def test_parameters_are_those_of_the_model(shared_family: Family, merge) -> None:
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    told = report_of(out)["model"]
    sizes = {name: p.numel() for name, p in load(out).named_parameters()}
    assert told["parameters"] == sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert told["active_parameters"] == sum(sizes.values()) - experts * 3 // 5
    assert f"| parameters | {told['parameters']:,} ({told['active_parameters']:,} active) |" in (
        card_of(out)
    )


def test_units_averages_and_copies_in_words() -> None:
    report = model(3, 4)
    parts = [dict(e) for e in report["lineage"]["experts"]]
    other = [*parts[:3], parts[3] | {"parents": (1, 2)}]
    report["lineage"]["units"] = [{"name": "a", "experts": parts}, {"name": "b", "experts": other}]
    report["lineage"]["experts"][3] = parts[3] | {"parents": None, "alpha": None}
    text = render(report, "")
    assert "| 3 | 2 pairs of experts | checkpoint-1000 75%, checkpoint-500 25% |" in text
    del report["lineage"]["units"]
    assert "| 3 | 2 checkpoints, averaged |" in render(report, "")
    copied = model(2, 2, parameters={"expansion": "copy"})
    text = render(copied, "")
    assert "It was upcycled from dense models" in text
    assert "| expert | copy of |" in text


def test_long_recipes_are_folded_and_end_no_fence() -> None:
    assert "<summary>mergekit_config.yml, 60 lines</summary>" in render(model(), "a: 1\n" * 60)
    assert fenced("a: '```'", "yaml") == "````yaml\na: '```'\n````"


def test_names_of_others_have_no_meaning_here() -> None:
    report = model()
    report["sources"]["checkpoints"][0]["name"] = "a|b <script> [x](y) `z`\n# no heading"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(render(report, ""))
    assert "<script>" not in html
    assert "no heading</h1>" not in html
    assert html.count("a|b &lt;script&gt; [x](y) `z` # no heading") >= 1


def test_post_training_and_others_are_told() -> None:
    report = model(
        post_training={
            "settings": {"train_modules": "lora", "learning_rate": 2e-4, "num_train_epochs": 1.0},
            "data": "sft",
            "samples": 1200,
            "tokens": 3_000_000,
            "steps": 75,
            "seconds": 12.0,
            "history": [
                {"step": 1, "loss": 2.0, "routing_entropy": 0.9},
                {"step": 75, "loss": 1.5, "dead_experts": 2},
            ],
        },
        evaluation=evaluation(4)
        | {"others": [{"model": "the base", "perplexity": 9.25, "groups": {"letters": 8.0}}]},
    )
    text = render(report, "a: 1\n")
    assert (
        "the whole mixture was trained by LoRA adapters, merged into it afterwards, on sft (1,200 "
        "samples, 75 steps, 3 M tokens, 12 s). Learning rate 0.0002, epochs 1. The loss was 2.000 "
        "at first and 1.500 at the end. Experts hardly used at the end: 2."
    ) in text
    assert "| model | letters | digits | all |" in text
    assert "| this mixture | **4.00** | **4.00** | **4.00** |" in text
    assert "| the base | 8.00 |   | 9.25 |" in text
    assert "upit-merge verify" not in text  # it is not what the recipe makes any more


def evaluated(perplexity: float, **others: float) -> str:
    """Return the card's evaluation of a mixture beside its experts and others, on one kind of text."""
    found = evaluation(2)
    group = {**found["groups"]["all"], "perplexity": perplexity}
    groups = {"all": {**group, "experts_alone": [6.0, 5.0], "control_perplexity": 4.5}}
    rows = [{"model": name, "perplexity": value} for name, value in others.items()]
    report = model(2, 2, evaluation={**found, "groups": groups, "others": rows})
    return render(report, "").partition("## Evaluation")[2]


def test_only_the_best_of_a_column_is_bold() -> None:
    text = evaluated(4.0, average=3.5)
    assert [line for line in text.splitlines() if "**" in line] == [
        "| average | **3.50** |",
        "| 1 | **5.00** |",
    ]
    assert "| this mixture | 4.00 |" in text
    assert evaluated(4.0, equal=4.0).count("**4.00**") == 2


def test_the_experts_alone_have_a_table() -> None:
    assert "| expert | all |\n|---:|---:|\n| 0 | 6.00 |\n| 1 | **5.00** |" in evaluated(4.0)


def test_a_report_without_rivals_says_that_they_were_not_measured() -> None:
    """As those of versions before there were any."""
    text = evaluated(4.0, dense=5.0)
    assert "Whether the mixture is worth its bytes was not measured" in text
    assert "--no-rivals" in text
    assert "| dense | 5.00 |" in text
    assert "measured on the same text before" not in text


def test_the_best_of_earlier_models_is_named_if_it_is_better() -> None:
    words = 'measured on the same text before, "{}" has a lower perplexity'
    assert words.format("average") in evaluated(4.0, dense=5.0, average=3.2, other=3.9)
    assert "has a lower perplexity" not in evaluated(4.0, twin=4.0)


def test_the_verdict_and_the_rivals_of_a_report() -> None:
    rival = {
        "kind": "average",
        "name": "the average of the checkpoints",
        "perplexity": 3.5,
        "gain": -0.1,
        "error": 0.02,
        "samples": 20,
    }
    worth = {
        "outcome": "not_worth",
        "verdict": "Not worth it: use the average.",
        "rivals": [rival],
        "left_out": "No base was there.",
    }
    found = evaluation(2)
    groups = {"all": {**found["groups"]["all"], "perplexity": 4.0}}
    report = model(2, 2, evaluation={**found, "groups": groups, "worth": worth})
    text = render(report, "").partition("## Evaluation")[2]
    assert text.count("Not worth it: use the average. No base was there.") == 1
    assert "was not measured" not in text
    (row,) = [line for line in text.splitlines() if "average of the checkpoints |" in line]
    assert "| **3.50** |" in row
    assert "higher" in row
    assert "| this mixture | 4.00 |" in text


def test_commands_in_sentences_are_code_and_what_is_foreign_is_not_read() -> None:
    answer = "Whether the mixture is worth its bytes, `upit-merge evaluate` tells."
    row = {"expert": 0, "samples": 9, "loss_own": None, "loss_all": None}
    verdict = f"The experts differ <b>little</b> `here. {answer}"
    router = {
        "settings": {},
        "data": {"samples": 9},
        "buckets": {"experts": [row], "worth": {"verdict": f"They differ *little*. {answer}"}},
        "chosen": {
            "temperature": 1.0,
            "experts_per_token": 2,
            "reason": "it was <i>given</i>",
            "shares": [0.99, 0.01],
            "expert_bytes": 10**6,
        },
    }
    text = render(model(2, 2, router=router), "")
    assert f"They differ \\*little\\*. {answer}" in text
    assert "(`upit-merge shrink --experts 1 --how drop`)" in text
    assert "it was \\<i\\>given" in text
    told = render(model(2, 2, router=router, evaluation=evaluation(2)), "")
    assert answer not in told  # it has told, on this very card
    assert "They differ \\*little\\*." in told
    router["buckets"]["worth"]["verdict"] = verdict
    html = MarkdownIt("commonmark", {"html": True}).render(render(model(2, 2, router=router), ""))
    assert "<b>" not in html
    assert with_code("a `b|c` `d") == r"a `b\|c` \`d"


def test_a_bound_is_no_model_and_never_bold() -> None:
    found = evaluation(2)
    for group in found["groups"].values():
        group["best_expert_per_sample"] = 1.0
    text = render(model(2, 2, evaluation=found), "")
    assert "| the best expert of each sample | 1.00 | 1.00 | 1.00 |" in text
    assert "| this mixture | **4.00** |" in text


def test_no_path_of_anybodys_disk_is_shown() -> None:
    recipe = """\
base_model: /home/anna smith/models/base   # from ~/downloads/x
models:
  - model: "/home/anna smith/sft/checkpoint-*"
  - {model: C:\\Users\\anna\\tuned, parameters: {density: 0.8}}
  - model: ../anna/other
  - model: ./sft/checkpoint-7
  - model: meta-llama/Llama-3.2-1B
  - model: /home/anna/base+/home/anna/adapter
router: {data: '~/anna/seed.jsonl'}
# see https://huggingface.co/anybody/model and/or ask
"""
    text = render(model(), recipe)
    shown = text.partition("```yaml")[2].partition("```")[0]
    assert "anna" not in shown
    assert (
        shown.strip()
        == """\
base_model: ./base   # from ./x
models:
  - model: "./checkpoint-*"
  - {model: ./tuned, parameters: {density: 0.8}}
  - model: ./other
  - model: ./sft/checkpoint-7
  - model: meta-llama/Llama-3.2-1B
  - model: ./base+./adapter
router: {data: './seed.jsonl'}
# see https://huggingface.co/anybody/model and/or ask"""
    )


def test_what_the_owner_says_of_the_model() -> None:
    card = {"name": "Ada 8x1B", "license": "apache-2.0", "language": ["de"], "tags": ["law", "moe"]}
    text = render(model(card=card), "")
    head = yaml.safe_load(text.split("---")[1])
    assert text.splitlines().count("# Ada 8x1B") == 1
    assert (head["license"], head["language"]) == ("apache-2.0", ["de"])
    assert head["tags"] == ["mergekit", "merge", "moe", "mixtral", "upit", "law"]
    assert "your-name/Ada-8x1B" in text
    other = yaml.safe_load(render(model(card={"license": "Ada Licence 2"}), "").split("---")[1])
    assert (other["license"], other["license_name"]) == ("other", "ada-licence-2")


def test_what_it_wrote_is_shown_as_it_is() -> None:
    samples = [{"prompt": "Why `x`?", "text": "Because.\n```\n# no heading"}]
    text = render(model(samples=samples), "")
    assert "## What it writes" in text
    assert "````text\nBecause.\n```\n# no heading\n````" in text


def test_markdown() -> None:
    assert escaped("a_b _c_ *d*") == r"a_b \_c\_ \*d\*"
    assert [amount(n) for n in (7, 999, 12_345, 999_600_000, 46_702_792_704)] == [
        "7",
        "999",
        "12.3 k",
        "1 B",
        "46.7 B",
    ]
    assert table([">a", "b"], [["1", ""]]) == "| a | b |\n|---:|---|\n| 1 |   |"


def test_results_of_others_alone_are_no_evaluation() -> None:
    others = [{"model": "the base", "perplexity": 9.0}]
    assert "## Evaluation" not in render(model(evaluation={"others": others}), "")


def breaking(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        *keys, last = path.split(".")
        for key in keys:
            report = report[int(key) if key.isdecimal() else key]  # type: ignore[index]
        report[int(last) if last.isdecimal() else last] = value  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    "change",
    [
        breaking("lineage.experts.3.parents", (0, 99)),
        breaking("lineage.experts.3.weights", [1.0]),
        breaking("lineage.experts.0.checkpoint", 7),
        breaking("lineage.experts", []),
        breaking("checkpoint_cosine", [[1.0]]),
        breaking("lineage.expected_gram", [[1.0, 2.0]]),
        breaking("model.num_experts", "many"),
        breaking("lineage.units", [{"name": "a", "experts": []}]),
        breaking("evaluation", evaluation(4) | {"whole": "none"}),
        breaking("evaluation", evaluation(4) | {"by_layer": [[1.0]]}),
    ],
)
def test_reports_that_make_no_sense_make_no_card(change: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads(json.dumps(model()))
    assert isinstance(describe(report), Report)
    change(report)
    assert not isinstance(describe(report), Report)


def test_only_programs_that_run_the_format_are_shown(tmp_path, merge) -> None:
    """A FlexOlmo is transformers' alone; of a GraniteMoE vLLM's limits are told."""
    for kind, shown in (("olmo2", False), ("granite", True)):
        family = build_family(tmp_path / kind, kind=kind, count=2)
        card = (merge(family.recipe(), f"{kind}-moe") / "README.md").read_text()
        assert "from transformers import pipeline" in card
        assert ("convert_hf_to_gguf.py" in card) == shown
        told = "interface (not with attention biases, which it drops without a word):"
        assert (told in card) == shown
