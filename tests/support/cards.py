"""What tests of the model card share: reports made up, and the Hub's rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from upit_merge.report import card
from upit_merge.report.document import Report, describe
from upit_merge.report.metadata import LICENSES

REPORT = "upit_report.json"


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / REPORT).read_text())


def card_of(out: Path) -> str:
    return (out / "README.md").read_text(encoding="utf-8")


def described(document: dict[str, Any]) -> Report:
    report = describe(document)
    assert isinstance(report, Report)
    return report


def render(document: dict[str, Any], recipe: str) -> str:
    """Return the card of a report, with the pictures it speaks of."""
    report = described(document)
    return card.render(report, report.pictures, recipe)


def model(num_checkpoints: int = 3, num_experts: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a report with all that a card needs, of checkpoints in a row and children of two each."""
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
        "versions": {"upit-merge": "0.5.0"},
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


def assert_valid_for_the_hub(path: Path) -> ModelCard:
    """Its rules, without asking it: what its own client parses, and what its documents say."""
    text = path.read_bytes().decode()
    assert REGEX_YAML_BLOCK.match(text)
    loaded = ModelCard.load(path)
    again = ModelCard(str(loaded))
    assert again.data.to_dict() == loaded.data.to_dict()
    data = loaded.data.to_dict()
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
    for target in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", loaded.text):
        assert re.fullmatch(r"[\w.-]+\.png", target)
        assert (path.parent / target).is_file()
    return loaded


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
