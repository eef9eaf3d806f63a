"""The model page: what the Hub makes of it, what it says, and when it is left alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from tests.conftest import Family
from tests.test_output import load
from upit_merge.cli import main
from upit_merge.report.facts import Facts
from upit_merge.report.markdown import amount, escaped, fenced, table
from upit_merge.report.metadata import LICENSES, metadata
from upit_merge.report.page import render
from upit_merge.report.sources import card_metadata, described, short_label

REPORT = "upit_report.json"


def done(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    return result.stderr


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / REPORT).read_text())


def page_of(out: Path) -> str:
    return (out / "README.md").read_text(encoding="utf-8")


def held_out(root: Path) -> Path:
    path = root / "held-out.jsonl"
    rows = [{"text": text * 4, "kind": kind} for text, kind in [("abcde", "letters")] * 4]
    rows += [{"text": f"{i}2345" * 4, "kind": "digits"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model(num_checkpoints: int = 3, num_experts: int = 4, **changes: Any) -> dict[str, Any]:
    """A report with all that a page needs, of checkpoints in a row and children of two each."""
    m, n = num_checkpoints, num_experts
    experts: list[dict[str, Any]] = []
    for i in range(n):
        own = [float(i == j) for j in range(m)]
        if i < m:
            experts.append({"checkpoint": i, "parents": None, "alpha": None, "weights": own})
            continue
        parents = (i % m, (i + 1) % m)
        weights = [0.25 * (j == parents[0]) + 0.75 * (j == parents[1]) for j in range(m)]
        experts.append({"checkpoint": None, "parents": parents, "alpha": 0.25, "weights": weights})
    vectors = torch.tensor([e["weights"] for e in experts], dtype=torch.float64) + 0.1
    cosines = torch.full((m, m), 0.5).fill_diagonal_(1).tolist()
    report = {
        "versions": {"upit-merge": "0.4.0"},
        "seed": 3,
        "dtype": "bfloat16",
        "experts_per_token": min(2, n),
        "parameters": {"expansion": "genetic", "density": 0.9},
        "checkpoint_cosine": cosines,
        "lineage": {
            "summary": f"{m} checkpoints make {n} experts",
            "experts": experts,
            "expected_gram": (vectors @ vectors.T).tolist(),
            "smallest_distance": 0.5 if n > 1 else None,
            "mean_distance": 1.5 if n > 1 else None,
            "largest_cosine": 0.9 if n > 1 else None,
        },
        "model": {
            "name": "my model",
            "format": "mixtral",
            "num_layers": 2,
            "num_experts": n,
            "parameters": 46_700_000_000,
            "active_parameters": 12_900_000_000,
            "tokenizer": True,
            "chat_template": False,
        },
        "sources": {
            "base": {"name": "base"},
            "checkpoints": [{"name": f"checkpoint-{500 * i}"} for i in range(1, m + 1)],
        },
        "router": None,
    }
    return report | changes


def stating(*licenses: dict[str, Any]) -> dict[str, Any]:
    """A report whose base and checkpoints have these cards."""
    report = model(len(licenses) - 1, len(licenses) - 1)
    base, *checkpoints = report["sources"]["base"], *report["sources"]["checkpoints"]
    for source, card in zip([base, *checkpoints], licenses, strict=True):
        source.update(card)
    return report


def hub_metadata(report: dict[str, Any]) -> dict[str, Any]:
    facts = Facts.of(report)
    assert facts is not None
    return metadata(facts)


def assert_valid_for_the_hub(path: Path) -> ModelCard:
    """Its rules, without asking it: what its own client parses, and what its documents say."""
    text = path.read_bytes().decode()
    assert REGEX_YAML_BLOCK.match(text)
    card = ModelCard.load(path)
    card_again = ModelCard(str(card))
    assert card_again.data.to_dict() == card.data.to_dict()
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"mergekit", "merge", "moe", "upit"} <= set(data["tags"])
    assert all(isinstance(tag, str) for tag in data["tags"])
    assert data.get("license", "mit") in LICENSES
    assert ("license_name" in data) <= (data.get("license") == "other")
    for language in data.get("language", []):
        assert re.fullmatch(r"[a-z]{2,3}(-\w+)?|code|multilingual", language)
    assert ("base_model" in data) == ("base_model_relation" in data)
    for name in data.get("base_model", []):
        validate_repo_id(name)
        assert not Path(name).exists()
    for target in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", card.text):
        assert re.fullmatch(r"[\w.-]+\.png", target)
        assert (path.parent / target).is_file()
    return card


# ---- metadata ----------------------------------------------------------------------------


def test_the_hub_reads_the_page(family: Family, merge) -> None:
    (family.base / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n# Base\n")
    out = merge(family.recipe(parameters={"num_experts": 5}))
    card = assert_valid_for_the_hub(out / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == ["en", "no"]  # Norwegian, which YAML takes for false
    assert card.data.base_model is None  # folders of this machine are nobody else's
    assert str(family.root) not in page_of(out).split("```yaml")[0]


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([{"license": "mit"}, {}, {}], {"license": "mit"}),
        ([{"license": "MIT"}, {"license": "mit"}], {"license": "mit"}),
        ([{}, {"license": "mit"}], {}),
        ([{}, {}], {}),
        (
            [{"license": "My Own 1.0", "license_link": "https://a.example/b"}, {}],
            {
                "license": "other",
                "license_name": "my-own-1.0",
                "license_link": "https://a.example/b",
            },
        ),
        (
            [
                {
                    "license": "other",
                    "license_name": "qwen",
                    "license_link": "LICENSE",
                    "hub_ids": ["Qwen/Q"],
                },
                {"license": "other", "license_name": "qwen"},
            ],
            {
                "license": "other",
                "license_name": "qwen",
                "license_link": "https://huggingface.co/Qwen/Q/blob/main/LICENSE",
            },
        ),
        # A file that is in nobody's repository is no link.
        (
            [{"license": "other", "license_name": "own", "license_link": "LICENSE"}, {}],
            {"license": "other", "license_name": "own"},
        ),
    ],
)
def test_licences_that_agree(licenses: list[dict[str, Any]], expected: dict[str, str]) -> None:
    report = stating(*licenses)
    found = {k: v for k, v in hub_metadata(report).items() if k.startswith("license")}
    assert found == expected
    assert "different licences" not in render(report, "")


def test_licences_that_do_not_agree_are_left_out_and_told() -> None:
    report = stating({"license": "mit"}, {"license": "gemma"}, {"license": "mit"})
    assert "license" not in hub_metadata(report)
    told = "state different licences (base `mit`, checkpoint-500 `gemma`), so this page states none"
    assert told in render(report, "")


def test_an_expert_that_was_added_has_a_say() -> None:
    report = stating({"license": "mit", "hub_ids": ["me/base"]}, {"license": "mit"})
    router = {"settings": {}, "data": {"samples": 3}}
    source = {"name": "new", "license": "gemma", "hub_ids": ["me/base", "me/new"]}
    report["extensions"] = [{"expert": 1, "gates": "its own", "source": source, "router": router}]
    found = hub_metadata(report)
    assert "license" not in found
    assert found["base_model"] == ["me/base", "me/new"]


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        ([["en"], [], ["en"]], ["en"]),
        ([["en"], ["de"]], None),
        ([[], ["de"]], None),
        ([["english", "zh-Hans", "code"], []], ["zh-Hans", "code"]),
    ],
)
def test_languages(languages: list[list[str]], expected: list[str] | None) -> None:
    report = stating(*({"language": named} for named in languages))
    assert hub_metadata(report).get("language") == expected


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\ndate: 2024-02-30\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: b}\nlanguage: 7\n---\n",
        "---\nlicense: mit",
        "no metadata",
        "---\nlicense: [mit, gemma]\n---\n",
        "\xff",
    ],
)
def test_odd_cards_state_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert not any(card_metadata(tmp_path).values())


def test_a_card_of_windows(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(
        b"\xef\xbb\xbf---\r\nlicense: [mit]\r\nlanguage: de\r\n---\r\n"
    )
    found = card_metadata(tmp_path)
    assert (found["license"], found["language"]) == ("mit", ["de"])


def test_a_folder_of_the_hubs_cache_has_an_id(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "hub" / "models--meta-llama--Llama-3" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)

    class Model:
        def __init__(self, label: str) -> None:
            self.label, self.folder = label, folder

    monkeypatch.chdir(tmp_path)
    labels = [str(folder), "me/code@v1", "./me/code", "me/a--b", f"{folder}+me/lora"]
    found = described([Model(label) for label in labels])
    assert [source["hub_ids"] for source in found] == [
        ["meta-llama/Llama-3"],
        ["me/code"],
        [],
        [],
        ["meta-llama/Llama-3", "me/lora"],
    ]
    assert short_label(str(folder)) == "meta-llama/Llama-3"


# ---- what it says ------------------------------------------------------------------------


def test_no_section_without_something_to_say() -> None:
    text = render(model(1, 1), "")
    assert re.findall(r"^## (.*)", text, re.M) == ["Run it", "Experts", "Router", "Make it again"]
    assert "mergekit-yaml" not in text  # there is no recipe to give it
    assert "A mixture of 1 expert per layer, 1 of them per token, in Mixtral format" in text
    assert "46.7 B parameters, of which a token meets 12.9 B" in text


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 4), (4, 16), (4, 17), (20, 64)])
def test_pages_of_every_size(m: int, n: int) -> None:
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
    compile(blocks[0][1], "page", "exec")
    assert 'model="your-name/my-model"' in blocks[0][1]
    assert "/v1/completions" in blocks[1][1]
    body = re.search(r"-d '(.*)'", blocks[1][1])
    assert body is not None
    assert json.loads(body[1])["model"] == "your-name/my-model"
    report["model"]["chat_template"] = True
    chat = re.findall(r"```(\w+)\n(.*?)\n```", render(report, ""), re.S)
    compile(chat[0][1], "page", "exec")
    assert "/v1/chat/completions" in chat[1][1]
    report["model"]["tokenizer"] = False
    assert "vllm serve" not in render(report, "")


def test_the_snippet_runs(shared_family: Family, merge) -> None:
    """With the folder for the id, as the page says."""
    out = merge(shared_family.recipe())
    block = re.findall(r"```python\n(.*?)\n```", page_of(out), re.S)[0]
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
        page_of(out)
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
        "samples, 75 steps, 3 M tokens). Learning rate 0.0002, epochs 1. The loss was 2.000 at "
        "first and 1.500 at the end. Experts hardly used at the end: 2."
    ) in text
    assert "| model | letters | digits | all |" in text
    assert "| **this mixture** | **4.00** | **4.00** | **4.00** |" in text
    assert "| the base | 8.00 |   | 9.25 |" in text
    assert "upit-merge verify" not in text  # it is not what the recipe makes any more


def evaluation(experts: int) -> dict[str, Any]:
    shares = [0.5, 0.5, *[0.0] * (experts - 2)]
    group = {"samples": 4, "targets": 50, "perplexity": 4.0, "routing": shares}
    return {
        "data": "held-out.jsonl",
        "whole": "all",
        "groups": {name: dict(group) for name in ("letters", "digits", "all")},
        "by_layer": [shares, shares],
        "dead_places": 4,
        "entropy": {"token": 0.5, "load": 0.5},
    }


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


# ---- when the model changes --------------------------------------------------------------


def test_an_evaluation_is_kept_until_the_model_changes(four: Family, moe: Path, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in moe.glob("model*")}
    data = held_out(tmp_path)
    evaluate = ("evaluate", moe, "--data", data, "--group-by", "kind", "--quiet")
    done(*evaluate, "--json", tmp_path / "e.json")
    assert "evaluation" not in report_of(moe)
    done(*evaluate, "--card")
    kept, whole = report_of(moe)["evaluation"], json.loads((tmp_path / "e.json").read_text())
    for name in ("letters", "digits", "all"):
        assert kept["groups"][name]["perplexity"] == whole["groups"][name]["perplexity"]
        layers = torch.tensor(whole["groups"][name]["routing"])
        assert kept["groups"][name]["routing"] == pytest.approx(layers.mean(0).tolist())
    assert kept["by_layer"] == whole["groups"]["all"]["routing"]
    text = page_of(moe)
    assert f"| **{kept['groups']['all']['perplexity']:.2f}** |" in text
    assert "upit_routing.png" in text
    assert "of held-out.jsonl" in text
    assert str(tmp_path) not in json.dumps(kept)
    assert {path.name: path.read_bytes() for path in moe.glob("model*")} == before
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())
    assert_valid_for_the_hub(moe / "README.md")
    done("verify", moe)

    # What another command measured on the same text stays, else it goes.
    report = report_of(moe)
    report["evaluation"]["others"] = [{"model": "the base", "perplexity": 9.0}]
    (moe / REPORT).write_text(json.dumps(report))
    done(*evaluate, "--card", "--no-experts")
    assert "| the base |   |   | 9.00 |" in page_of(moe)
    assert "alone, the best of them" not in page_of(moe)
    done("evaluate", moe, "--data", four.seed_file(), "--card", "--quiet")
    assert "others" not in report_of(moe)["evaluation"]

    done("router", moe, "--data", four.seed_file(), "--quiet")
    assert "evaluation" not in report_of(moe)
    assert "## Evaluation" not in page_of(moe)
    assert not (moe / "upit_routing.png").exists()
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())


def test_one_kind_of_text_is_all(moe: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "abc abc", "kind": "only"}\n' * 3)
    done("evaluate", moe, "--data", data, "--group-by", "kind", "--card", "--quiet")
    assert "| model | only |" in page_of(moe)


def test_a_page_that_was_edited_is_left_alone(four: Family, moe: Path, caplog) -> None:
    own = page_of(moe) + "\nMy own words.\n"
    (moe / "README.md").write_text(own)
    pictures = {path: path.read_bytes() for path in moe.glob("*.png")}
    done("router", moe, "--data", four.seed_file(), "--objective", "ridge", "--quiet")
    done("shrink", moe, "--experts", "3", "--data", four.seed_file(), "--quiet")
    assert page_of(moe) == own
    assert {path: path.read_bytes() for path in moe.glob("*.png")} == pictures
    assert caplog.text.count("was edited since it was written, so it is left as it is.") == 2
    assert report_of(moe)["model"]["num_experts"] == 3
    assert "was edited since it was written; add --force to replace it." in refused("page", moe)
    done("page", moe, "--force")
    assert "A mixture of 3 experts" in page_of(moe)
    text = page_of(moe)
    done("page", moe)
    assert page_of(moe) == text


def test_a_page_that_was_removed_is_not_missed(four: Family, moe: Path, caplog) -> None:
    (moe / "README.md").unlink()
    done("router", moe, "--data", four.seed_file(), "--quiet")
    assert not (moe / "README.md").exists()
    assert "README" not in caplog.text
    done("page", moe)
    assert "pre-trained layer by layer" in page_of(moe)
    assert_valid_for_the_hub(moe / "README.md")


def test_models_of_older_versions_work_as_they_did(
    four: Family, moe: Path, tmp_path, caplog
) -> None:
    """Their reports lack what the page needs: the page stays, all else is done."""
    report = report_of(moe)
    for key in ("model", "sources", "page", "seed_option"):
        del report[key]
    (moe / REPORT).write_text(json.dumps(report))
    (moe / "README.md").write_text("# An older page\n")
    data = ("--data", four.seed_file(), "--quiet")
    done("router", moe, *data)
    done("extend", moe, "--model", four.checkpoints[3], *data)
    done("verify", moe)
    done("shrink", moe, "--experts", "4", *data)
    done("evaluate", moe, "--data", held_out(tmp_path), "--card", "--quiet")
    assert page_of(moe) == "# An older page\n"
    assert "not written by this version of upit-merge, so it is left as it is" in caplog.text
    after = report_of(moe)
    assert "model" not in after
    assert after["evaluation"]["groups"]["all"]["samples"] == 8
    assert "has not all that a model page says" in refused("page", moe)


def test_without_a_report_there_is_nothing_to_keep_results_in(moe: Path, tmp_path: Path) -> None:
    (moe / REPORT).unlink()
    told = refused("evaluate", moe, "--data", held_out(tmp_path), "--card")
    assert "has no upit_report.json to keep the results in; leave out --card" in told


def test_an_interrupted_edit_is_finished_first(moe: Path, tmp_path: Path, monkeypatch) -> None:
    """The page is half-way into place: other commands wait for the one that put it there."""
    import os

    original = os.replace

    def fail_on_the_page(source: Any, target: Any) -> None:
        if Path(target) == moe / REPORT:
            raise KeyboardInterrupt
        original(source, target)

    evaluate = ("evaluate", moe, "--data", held_out(tmp_path), "--card", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_the_page)
        assert CliRunner().invoke(main, [str(a) for a in evaluate]).exit_code == 1
    assert "What `upit-merge evaluate` makes is half-way" in refused("page", moe)
    done(*evaluate)
    assert_valid_for_the_hub(moe / "README.md")
    assert report_of(moe)["files"] == sorted(path.name for path in moe.iterdir())


def test_a_picture_that_cannot_be_drawn_is_left_out(
    shared_family, merge, monkeypatch, caplog
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("matplotlib.figure.Figure.subplots", broken)
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    assert load(out).config.num_local_experts == 5
    assert "upit_experts.png is left out of the model page (no fonts)." in caplog.text
    assert "upit_experts.png" not in page_of(out)
    assert not (out / "upit_experts.png").exists()
    assert_valid_for_the_hub(out / "README.md")


def test_overwriting_leaves_no_picture_behind(shared_family, merge) -> None:
    out = merge(shared_family.recipe(parameters={"num_experts": 5}))
    assert (out / "upit_experts.png").is_file()
    merge(shared_family.recipe(), overwrite=True)
    assert not (out / "upit_experts.png").exists()
    assert report_of(out)["files"] == sorted(path.name for path in out.iterdir())


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
def test_reports_that_make_no_sense_make_no_page(change: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads(json.dumps(model()))
    assert Facts.of(report) is not None
    change(report)
    assert Facts.of(report) is None


def test_the_page_depends_on_report_and_recipe_alone(moe: Path, tmp_path: Path) -> None:
    recipe = (moe / "mergekit_config.yml").read_text()
    assert render(report_of(moe), recipe) == page_of(moe)
    elsewhere = shutil.copytree(moe, tmp_path / "renamed")
    done("page", elsewhere)
    assert page_of(elsewhere) == page_of(moe)
    assert yaml.safe_load(recipe)["merge_method"] == "upit"
