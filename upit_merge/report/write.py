"""Report and model page of a folder: written together, and again when the model changes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upit_merge.io.text_file import write_json
from upit_merge.io.untrusted import own_file
from upit_merge.output.edit import Edit
from upit_merge.output.staging import REPORT
from upit_merge.report.card import render
from upit_merge.report.facts import Facts
from upit_merge.report.plots import NAMES, draw_pictures

LOG = logging.getLogger(__name__)

PAGE = "README.md"
RECIPE_COPY = "mergekit_config.yml"


def write_card(folder: Path, report: Mapping[str, Any], recipe_source: str) -> dict[str, Any]:
    """Write the page and its pictures into a folder that is not the model yet.

    Returns the report with what it needs to know of them: which pictures there are, and a digest
    by which a page that its owner has edited is told from one that may be replaced.

    Raises:
        ValueError: the report has not all a page says.
    """
    facts = Facts.of(report)
    if facts is None:
        raise ValueError("the report has not all a model page says")
    pictures = draw_pictures(folder, facts)
    text = render({**report, "page": {"pictures": pictures}}, recipe_source)
    (folder / PAGE).write_bytes(text.encode())  # the same bytes on every system
    return {**report, "page": {"pictures": pictures, "sha256": _digest(folder / PAGE)}}


def write_report_and_card(
    edit: Edit,
    before: Mapping[str, Any],
    changes: Mapping[str, Any],
    obsolete: Sequence[str] = (),
    *,
    same_model: bool = False,
    replace_page: bool = False,
) -> list[str]:
    """Prepare report and page of a model that an edit changes; to be called when all else is.

    What was evaluated was the model before: its record goes, unless `changes` has a new one.

    Args:
        before: From `read_report`; if that is empty nothing is written.
        changes: New values of its keys.
        obsolete: Names of the model's files that go.
        same_model: Only what is told of the model changes.
        replace_page: Write the page whatever is there.

    Returns:
        `obsolete`, with the pictures that are not shown any more.
    """
    out, gone = edit.out, list(obsolete)
    if not before:
        LOG.info("%s has no %s; it is not updated.", out, REPORT)
        return gone
    report = {**before, **changes}
    if not same_model:
        report["history"] = [*before.get("history", []), {"command": edit.command}]
        if "evaluation" in before and "evaluation" not in changes:
            del report["evaluation"]
            LOG.warning("The evaluation in the report was of the model before and is removed.")
    if replace_page or card_is_ours(out, before):
        earlier = (before.get("page") or {}).get("pictures", [])
        report = write_card(edit.model, report, recipe_of(out))
        # Of our own names only: a report may come from anywhere, and these files are removed.
        gone += [n for n in NAMES if n in earlier and n not in report["page"]["pictures"]]
    files = {*before.get("files", []), *(path.name for path in edit.model.iterdir()), REPORT}
    report["files"] = sorted(files - set(gone))
    write_json(edit.model / REPORT, report)
    return gone


def recipe_of(out: Path) -> str:
    """The text of the recipe that is kept beside a model; empty if there is none."""
    path = own_file(out / RECIPE_COPY, out)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def card_is_ours(out: Path, report: Mapping[str, Any]) -> bool:
    """Whether a folder has a page, and it is as we wrote it; says so if it is not."""
    if not (out / PAGE).is_file():
        return False
    if reason := why_kept(out, report):
        LOG.warning("%s, so it is left as it is.", reason)
        return False
    return True


def why_kept(out: Path, report: Mapping[str, Any]) -> str | None:
    """Why the page must not be replaced, as half a sentence; None if it may be."""
    path = out / PAGE
    if not path.is_file():
        return None
    recorded = (report.get("page") or {}).get("sha256")
    if recorded is None or Facts.of(report) is None:
        return f"{path} was not written by this version of upit-merge"
    if _digest(path) != recorded:
        return f"{path} was edited since it was written"
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
