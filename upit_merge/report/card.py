"""The model card, `README.md` of the output, written without any network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from upit_merge.checkpoints import looks_like_path
from upit_merge.expansion.lineage import Lineage
from upit_merge.formats import MoeFormat
from upit_merge.references import split_reference
from upit_merge.report.tables import origin_of
from upit_merge.tensor_files import DenseModel

_EXPERTS_HEADING = "## Experts"
_ROUTER_HEADING = "## Router"
_USE_HEADING = "## Use"
_TABLE_RULE = "|---|---|---|"
_ADDED_LATER = " was added later:"

_METHOD = {
    "genetic": "It was grown from the checkpoints of an instruction-tuning run with upit-merge, an "
    "implementation of [UpIT](https://arxiv.org/abs/2410.01610),",
    "copy": "It was upcycled from dense models, whose FFNs it has copies of, with upit-merge",
}


def _hub_ids(models: Sequence[DenseModel]) -> list[str]:
    """The references that name a model on the Hub: local folders mean nothing to other people."""
    ids = []
    references = (part for model in models for part in split_reference(model.label) if part)
    for reference in references:
        local = looks_like_path(reference) or Path(reference).expanduser().is_dir()
        name = reference.partition("@")[0]
        if not local and name not in ids:
            ids.append(name)
    return ids


def _base_card_metadata(base: DenseModel) -> dict[str, Any]:
    """`license` and `language` of the base's card, if it came with one."""
    try:
        text = (base.folder / "README.md").read_text(encoding="utf-8")
        parts = text.split("---\n")
        metadata = yaml.safe_load(parts[1]) if text.startswith("---\n") and len(parts) > 2 else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # ValueError: 30 February
        return {}
    if not isinstance(metadata, dict):
        return {}
    kept = ("license", "license_name", "license_link", "language")
    return {key: metadata[key] for key in kept if key in metadata}


def model_card(
    name: str,
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
    lineage: Lineage,
    recipe_source: str,
    router_sentence: str,
    experts_per_token: int,
    form: MoeFormat,
) -> str:
    """The card's Markdown, with metadata the Hub understands."""
    metadata: dict[str, Any] = {
        **_base_card_metadata(base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "moe", form.name, "upit"],
    }
    if ids := _hub_ids([base, *checkpoints]):
        metadata |= {"base_model": ids, "base_model_relation": "merge"}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {name}",
        "",
        f"A mixture of {len(lineage)} experts per layer, {experts_per_token} of them per token, in "
        f"{form.title} format. {_METHOD['copy' if lineage.copies else 'genetic']} and "
        "[mergekit](https://github.com/arcee-ai/mergekit).",
        "",
        _EXPERTS_HEADING,
        "",
        (
            f"{lineage.summary[0].upper()}{lineage.summary[1:]}."
            if lineage.copies
            else f"Deltas to {short_label(base.label)}: {lineage.summary}."
        ),
        "",
        "| expert | grown from | share of each checkpoint |",
        _TABLE_RULE,
    ]
    names = _told_apart([checkpoint.label for checkpoint in checkpoints])
    for index, expert in enumerate(lineage.experts):
        if expert.checkpoint is not None:
            lines.append(f"| {index} | {names[expert.checkpoint]} | |")
            continue
        shares = ", ".join(
            f"{names[i]} {share:.0%}" for i, share in enumerate(expert.weights) if share
        )
        lines.append(f"| {index} | {origin_of(lineage, index)} | {shares} |")
    lines += [
        "",
        _ROUTER_HEADING,
        "",
        router_sentence,
        "",
        _USE_HEADING,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("<this model>", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("<this model>")',
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_source.rstrip(),
        "```",
        "",
        "`upit_report.json` has the whole lineage, the similarity of the checkpoints and the seeds.",
        "",
    ]
    return "\n".join(lines)


def with_router_sentence(card: str, sentence: str) -> str:
    """The card with another router section; unchanged if it is not one of ours."""
    return _with_section(card, _ROUTER_HEADING, _USE_HEADING, lambda _old: sentence)


def with_added_expert(card: str, expert: int, name: str, sentence: str | None) -> str:
    """The card of a model with one more expert; unchanged if it is not one of ours.

    Args:
        expert: Its number.
        name: What it was made from.
        sentence: About its gate; None if all gates are new.
    """

    def added(old: str) -> str:
        if _TABLE_RULE in old:
            return f"{old}\n| {expert} | {name}, added later | |"
        return f"{old}\n\nExpert {expert} is {name}, added later."

    card = _with_section(_counted(card, expert + 1), _EXPERTS_HEADING, _ROUTER_HEADING, added)
    if sentence is None:
        return card
    told = f"Expert {expert}{_ADDED_LATER} {sentence}"
    return _with_section(card, _ROUTER_HEADING, _USE_HEADING, lambda old: f"{old}\n\n{told}")


def with_merged_experts(card: str, count: int, text: str) -> str:
    """The card of a model with fewer experts, about which `text` says all; as above."""

    def forgotten(old: str) -> str:
        return "\n\n".join(part for part in old.split("\n\n") if _ADDED_LATER not in part)

    card = _with_section(
        _counted(card, count), _EXPERTS_HEADING, _ROUTER_HEADING, lambda _old: text
    )
    return _with_section(card, _ROUTER_HEADING, _USE_HEADING, forgotten)


def _counted(card: str, count: int) -> str:
    return re.sub(r"(?m)^A mixture of \d+ experts", f"A mixture of {count} experts", card, count=1)


def _with_section(card: str, heading: str, following: str, change: Callable[[str], str]) -> str:
    """The card with one section changed; as it is if it has not both headings."""
    before, found, rest = card.partition(f"\n{heading}\n")
    old, end, after = rest.partition(f"\n{following}\n")
    if not (found and end):
        return card
    return f"{before}{found}\n{change(old.strip())}\n{end}{after}"


def router_sentence(report: dict[str, Any] | None) -> str:
    """What the gates are, from the router's part of the report."""
    if report is None:
        return "The gates are random: no seed data was given, the router is yet to be trained."
    settings, samples = report["settings"], report["data"]["samples"]
    if "buckets" not in report:
        sentence = "The gates are random."
    elif (settings.get("upit") or {}).get("train_experts"):
        sentence = (
            f"Every expert was trained together with its routing vectors on its own part of "
            f"{samples} seed samples, {_assigned(settings['assign'])}."
        )
    else:
        sentence = (
            f"The gates were pre-trained layer by layer on {samples} seed samples "
            f"(`{settings['objective']}`), {_assigned(settings['assign'])}."
        )
    if "refined" in report:
        sentence += (
            f" Then the gates were trained for {settings['refine']['steps']} steps on the loss of "
            "the whole mixture."
        )
    return sentence


def _assigned(rule: Any) -> str:
    if isinstance(rule, dict):
        return f"each assigned to an expert by its `{rule['column']}`"
    if rule == "shuffled":
        return "each assigned to an expert at random (a control)"
    return "each assigned to an expert by its perplexity"


def _told_apart(labels: Sequence[str]) -> list[str]:
    """Short labels; with the folder they are in where several would be the same."""
    short = [short_label(label) for label in labels]
    return [
        "/".join(Path(label).parts[-2:]) if short.count(name) > 1 else name
        for label, name in zip(labels, short, strict=True)
    ]


def short_label(label: str) -> str:
    """A local path says more about somebody's disk than about the model: keep its last part.

    Of `BASE+ADAPTER` the adapter tells the experts apart.
    """
    label = split_reference(label)[1] or label
    return Path(label).name if looks_like_path(label) or Path(label).is_dir() else label
