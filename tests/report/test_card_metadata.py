"""What the card tells the Hub: by its rules, and only what is certain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from tests.conftest import Family
from tests.support.cards import (
    assert_valid_for_the_hub,
    card_of,
    described,
    evaluation,
    model,
    render,
)
from upit_merge.report.metadata import metadata
from upit_merge.report.sources import card_metadata, describe_sources, short_label


def stating(*licenses: dict[str, Any]) -> dict[str, Any]:
    """A report whose base and checkpoints have these cards."""
    report = model(len(licenses) - 1, len(licenses) - 1)
    base, *checkpoints = report["sources"]["base"], *report["sources"]["checkpoints"]
    for source, card in zip([base, *checkpoints], licenses, strict=True):
        source.update(card)
    return report


def hub_metadata(report: dict[str, Any]) -> dict[str, Any]:
    return metadata(described(report))


def test_the_hub_reads_the_card(family: Family, merge) -> None:
    (family.base / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n# Base\n")
    out = merge(family.recipe(parameters={"num_experts": 5}))
    card = assert_valid_for_the_hub(out / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == ["en", "no"]  # Norwegian, which YAML takes for false
    assert card.data.base_model is None  # folders of this machine are nobody else's
    assert str(family.root) not in card_of(out).split("```yaml")[0]


@pytest.mark.parametrize(
    ("data", "dataset"),
    [
        ("held-out.jsonl", "custom"),
        ("imdb", "custom"),
        ("me/texts", "me/texts"),
        ("a/b/c", "custom"),
    ],
)
def test_perplexities_are_the_models_results_on_the_hub(
    tmp_path: Path, data: str, dataset: str
) -> None:
    """Read back by the Hub's own client."""
    results = evaluation(4) | {"data": data}
    for name, perplexity in (("letters", 3.123456), ("digits", float("inf")), ("all", 4.25)):
        results["groups"][name]["perplexity"] = perplexity
    path = tmp_path / "README.md"
    path.write_text(render(model(evaluation=results), ""), encoding="utf-8")
    loaded = ModelCard.load(path).data
    assert loaded.model_name == "my model"
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in loaded.eval_results} == {
        ("text-generation", dataset, data)
    }
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in loaded.eval_results] == [
        ("perplexity", "perplexity", 4.25),
        ("perplexity", "perplexity on letters", 3.1235),
    ]
    (index,) = metadata_load(path)["model-index"]
    assert [len(result["metrics"]) for result in index["results"]] == [2]
    json.dumps(index, allow_nan=False)
    for name in results["groups"]:
        results["groups"][name]["perplexity"] = float("nan")
    for document in (model(), model(evaluation=results)):
        path.write_text(render(document, ""), encoding="utf-8")
        assert not {"model-index", "model_name"} & metadata_load(path).keys()


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
    report["extensions"][0]["sha256"] = "0"
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
    found = describe_sources([Model(label) for label in labels])
    assert [source["hub_ids"] for source in found] == [
        ["meta-llama/Llama-3"],
        ["me/code"],
        [],
        [],
        ["meta-llama/Llama-3", "me/lora"],
    ]
    assert short_label(str(folder)) == "meta-llama/Llama-3"
