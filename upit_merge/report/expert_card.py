"""The model card of an expert that was made a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import Report
from upit_merge.report.expert_sections import linked
from upit_merge.report.markdown import escaped
from upit_merge.report.metadata import metadata
from upit_merge.report.sources import card_metadata

_CARRIED = ("license", "license_name", "license_link", "language", "base_model")


def expert_card(
    name: str,
    mixture: str,
    folder: Path,
    report: AnyReport,
    told: str,
    experts: Sequence[int],
    title: str,
) -> str:
    """Return the text of `README.md`.

    Args:
        name, mixture: What the dense model and the mixture are called.
        folder: The mixture's.
        report: Of the mixture; licence and models that it was made of are taken from there, or
            else from its card.
        told: Which expert it is, as a sentence begins.
        experts: The numbers of those whose mean it is.
        title: Of the dense family.
    """
    sections = [
        f"---\n{_front_matter(folder, report)}---",
        f"# {escaped(name)}",
        f"{told} of the mixture of experts `{escaped(mixture)}`, as a dense {escaped(title)} "
        "model: the mixture's attention, norms and embeddings, and this FFN in every layer. It "
        "computes what the mixture does if every token goes through it.",
        *_origin(report, experts),
        "Made by `upit-merge extract`.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(folder: Path, report: AnyReport) -> str:
    if isinstance(report, Report):
        stated = metadata(report)
    else:
        stated = {key: value for key, value in card_metadata(folder).items() if value}
    fields: dict[str, Any] = {key: stated[key] for key in _CARRIED if key in stated}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = ["merge", "upit"]
    if "base_model" in fields:
        fields["base_model_relation"] = "merge"
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _origin(report: AnyReport, experts: Sequence[int]) -> list[str]:
    """Say which checkpoint an expert is, as long as nothing has changed it."""
    if not isinstance(report, Report) or len(experts) != 1:
        return []
    if report.shrunk or report.post_training or (report.router and report.router.experts_sha256):
        return []
    for extension in report.extensions:
        if extension.expert == experts[0]:
            return [f"Its FFN is that of {linked(extension.source)}."]
    if experts[0] >= len(report.lineage.experts):
        return []
    checkpoint = report.lineage.experts[experts[0]].checkpoint
    if checkpoint is None or report.is_copied:
        return []
    return [f"Its FFN is that of {linked(report.sources.checkpoints[checkpoint])}."]
