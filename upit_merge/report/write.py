"""Report and model card of a folder: written together, and again when the model changes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upit_merge.io.text_file import write_json
from upit_merge.io.untrusted import own_file
from upit_merge.output.edit import Edit
from upit_merge.output.staging import REPORT
from upit_merge.report.any_version import AnyReport
from upit_merge.report.card import render
from upit_merge.report.document import Report, after, describe
from upit_merge.report.plots import NAMES, draw_pictures

LOG = logging.getLogger(__name__)

CARD = "README.md"
RECIPE_COPY = "mergekit_config.yml"


def write_card(folder: Path, report: AnyReport, recipe_source: str) -> dict[str, Any]:
    """Write the card and its pictures into a folder that is not the model yet.

    Returns:
        The report with what it needs to know of them: which pictures there are, and a digest by
        which a card that its owner has edited is told from one that may be replaced.

    Raises:
        ValueError: the report has not all a card says.
    """
    if not isinstance(report, Report):
        raise ValueError("the report has not all a model card says")
    pictures = draw_pictures(folder, report)
    text = render(report, pictures, recipe_source)
    (folder / CARD).write_bytes(text.encode())  # the same bytes on every system
    page = {"pictures": pictures, "sha256": _digest(folder / CARD)}
    return {**report.document, "page": page}


def write_report_and_card(
    edit: Edit,
    before: AnyReport,
    changes: Mapping[str, Any],
    obsolete: Sequence[str] = (),
    *,
    same_model: bool = False,
    replace_card: bool = False,
    digest: str | None = None,
) -> list[str]:
    """Prepare report and card of a model that an edit changes; to be called when all else is.

    Args:
        before: From `read_report`; if there was none nothing is written.
        changes: New values of its keys.
        obsolete: Names of the model's files that go.
        same_model: Only what is told of the model changes.
        replace_card: Write the card whatever is there.
        digest: By which the same call is known when it is given again.

    Returns:
        `obsolete`, with the pictures that are not shown any more.
    """
    out, gone = edit.out, list(obsolete)
    if not before.document:
        LOG.info("%s has no %s; it is not updated.", out, REPORT)
        return gone
    if same_model:
        report = describe({**before.document, **changes})
    else:
        report = after(before, edit.command, changes, digest)
    if "evaluation" in before.document and "evaluation" not in report.document:
        LOG.warning("The evaluation in the report was of the model before and is removed.")
    document = dict(report.document)
    if replace_card or card_is_ours(out, before):
        document = write_card(edit.model, report, recipe_of(out))
        shown = document["page"]["pictures"]
        # Of our own names only: a report may come from anywhere, and these files are removed.
        gone += [name for name in NAMES if name in before.pictures and name not in shown]
    files = {*before.files, *(path.name for path in edit.model.iterdir()), REPORT}
    path = edit.model / REPORT
    write_json(path, {**document, "files": sorted(files - set(gone))})
    if same_model and (out / REPORT).is_file():
        # Its time still says when the model was made: what was written later was by somebody else.
        made = (out / REPORT).stat().st_mtime_ns
        os.utime(path, ns=(made, made))
    return gone


def recipe_of(out: Path) -> str:
    """Return the text of the recipe that is kept beside a model; empty if there is none."""
    path = own_file(out / RECIPE_COPY, out)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def card_is_ours(out: Path, report: AnyReport) -> bool:
    """Tell whether a folder has a card, and it is as we wrote it; warn if it is not."""
    if not (out / CARD).is_file():
        return False
    if reason := why_kept(out, report):
        LOG.warning("%s, so it is left as it is.", reason)
        return False
    return True


def why_kept(out: Path, report: AnyReport) -> str | None:
    """Say why the card must not be replaced, as half a sentence; None if it may be."""
    path = out / CARD
    if not path.is_file():
        return None
    recorded = report.page.sha256 if report.page else None
    if recorded is None or not isinstance(report, Report):
        return f"{path} was not written by this version of upit-merge"
    if _digest(path) != recorded:
        return f"{path} was edited since it was written"
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
