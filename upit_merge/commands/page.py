"""`upit-merge page`: the card of a finished model, rendered anew from its report."""

from __future__ import annotations

from pathlib import Path

from upit_merge.errors import UpitError
from upit_merge.io.disk import explained_failures
from upit_merge.output.edit import Edit
from upit_merge.output.staging import REPORT
from upit_merge.report.document import Report, read_report
from upit_merge.report.write import why_kept, write_report_and_card


def refresh_card(out: Path, *, replace_edited: bool = False) -> None:
    """Render the card of a finished model anew from its report.

    Args:
        replace_edited: Replace a card that its owner has edited, too.

    Raises:
        UpitError: `out` has no report, or one of an older version, or the card is the owner's.
    """
    with explained_failures(out):
        edit = Edit(out, "page")
        with edit.begun(), edit.interruptible("the model card is as it was"):
            before = read_report(out)
            if not isinstance(before, Report):
                raise UpitError(
                    f"The {REPORT} in {out} has not all that a model card says; a model made, or "
                    "made again, with this version has."
                )
            if not replace_edited and (reason := why_kept(out, before)):
                raise UpitError(f"{reason}; add --force to replace it.")
            edit.emptied()
            gone = write_report_and_card(edit, before, {}, same_model=True, replace_card=True)
            edit.put_into_place({}, gone)
