"""The metadata block of a model card, by the rules of the Hugging Face Hub."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from upit_merge.report.document import Report
from upit_merge.report.markdown import escaped
from upit_merge.report.sources import Source, is_hub_id

# The identifiers the Hub takes for `license`, from its documentation; others are an error there.
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
# Codes of ISO 639, with a region or script; the Hub knows two more words.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")


def front_matter(report: Report) -> str:
    """Return the block with which the card begins."""
    text = yaml.safe_dump(metadata(report), sort_keys=False, allow_unicode=True)
    return f"---\n{text.rstrip()}\n---"


def metadata(report: Report) -> dict[str, Any]:
    """Return what the Hub is told: where the model comes from, what runs it, who may use it."""
    fields: dict[str, Any] = {**_license(report), "library_name": "transformers"}
    if languages := _languages(report):
        fields["language"] = languages
    fields["pipeline_tag"] = "text-generation"
    tags = ["mergekit", "merge", "moe", report.model.format, "upit", *report.card.tags]
    fields["tags"] = list(dict.fromkeys(tags))
    ids = [name for source in report.all_sources for name in source.hub_ids]
    if ids:
        fields |= {"base_model": list(dict.fromkeys(ids)), "base_model_relation": "merge"}
    return fields | _results(report)


def _results(report: Report) -> dict[str, Any]:
    """Return the perplexities as the `model-index` that the Hub shows beside the card."""
    from huggingface_hub import EvalResult, ModelCardData

    evaluation = report.evaluation
    if evaluation is None:
        return {}
    data, whole = evaluation.data, evaluation.whole
    # A file may be called like somebody's dataset: what has no owner is not taken for one.
    dataset = data if "/" in data and is_hub_id(data) else "custom"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=data,
            metric_type="perplexity",
            metric_name="perplexity" if name == whole else f"perplexity on {name}",
            metric_value=round(evaluation.groups[name].perplexity, 4),
        )
        for name in dict.fromkeys([whole, *evaluation.groups])
        if math.isfinite(evaluation.groups[name].perplexity)  # the Hub's JSON has no other numbers
    ]
    if not results:
        return {}
    return dict(ModelCardData(model_name=report.name, eval_results=results).to_dict())


def _statement(source: Source) -> tuple[str, str | None] | None:
    """Return the licence of a model so that it can be compared: identifier, or `other` and name.

    One that the Hub has no identifier for is `other`, with a name made of what it is called.
    """
    if source.license is None:
        return None
    name = source.license.lower()
    if name in LICENSES and name != "other":
        return name, None
    stated = source.license_name if name == "other" else source.license
    slug = re.sub(r"[^a-z0-9.]+", "-", (stated or "").lower()).strip("-.")
    return "other", slug or None


def _license(report: Report) -> dict[str, str]:
    """Return the owner's licence, or the base's, unless some other model states another one."""
    base = report.sources.base
    if report.card.license:
        base = Source(name=report.name, license=report.card.license)
    statement = _statement(base)
    if statement is None or disagreement(report):
        return {}
    identifier, name = statement
    if identifier != "other":
        return {"license": identifier}
    found = {"license": identifier, **({"license_name": name} if name else {})}
    if name and (link := _link(base)):
        found["license_link"] = link
    return found


def _link(source: Source) -> str | None:
    """Return where the licence can be read; the name of a file is one of the base's repository."""
    link = source.license_link
    if link is None or link.startswith(("https://", "http://")):
        return link
    if source.hub_ids and re.fullmatch(r"[\w.-]+", link):
        return f"https://huggingface.co/{source.hub_ids[0]}/blob/main/{link}"
    return None


def disagreement(report: Report) -> str | None:
    """Return a sentence if the models it is made of state several licences."""
    stated: dict[tuple[str, str | None], str] = {}
    for source in report.all_sources:
        if (statement := _statement(source)) is not None:
            stated.setdefault(statement, source.name)
    if len(stated) < 2 or report.card.license:
        return None
    told = ", ".join(
        f"{escaped(name)} `{named or identifier}`" for (identifier, named), name in stated.items()
    )
    return (
        f"The models it is made of state different licences ({told}), so this page states none: "
        "what applies to the mixture is for whoever publishes it to say."
    )


def _languages(report: Report) -> list[str]:
    """Return the owner's languages, or the base's, unless some other model states others."""
    if report.card.language:
        return [name for name in report.card.language if _LANGUAGE.fullmatch(name)]
    stated = [set(source.language) for source in report.all_sources if source.language]
    if any(languages != set(report.sources.base.language) for languages in stated):
        return []
    return [name for name in report.sources.base.language if _LANGUAGE.fullmatch(name)]
