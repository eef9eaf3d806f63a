"""`upit-merge page`: the card of a finished model, rendered anew from its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from upit_merge.commands.dialogue.conversation import Conversation
from upit_merge.commands.dialogue.voices import VoiceOptions, load_voice
from upit_merge.config.recipe import load_recipe
from upit_merge.errors import UpitError, counted, printable
from upit_merge.io.disk import explained_failures
from upit_merge.output.edit import Edit
from upit_merge.output.staging import REPORT, check_not_half_edited, check_output_exists
from upit_merge.report.document import Report, read_report
from upit_merge.report.write import CARD, why_kept, write_report_and_card

_SAMPLE_TOKENS = 160
_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def refresh_card(
    out: Path,
    *,
    replace_edited: bool = False,
    recipe: Path | None = None,
    prompts: Sequence[str] = (),
    quiet: bool = False,
) -> None:
    """Render the card of a finished model anew from its report.

    Args:
        replace_edited: Replace a card that its owner has edited, too.
        recipe: Its `card:` block takes the place of the recorded one.
        prompts: Let the model answer these, and show the answers instead of earlier ones; it is
            loaded whole for that.

    Raises:
        UpitError: `out` has no report, or one of an older version, or the card is the owner's; the
            recipe cannot be read; or the model does not fit into memory.
    """
    check_output_exists(out)
    check_not_half_edited(out, "page")
    _report(out, replace_edited=replace_edited)
    changes: dict[str, Any] = {}
    if recipe is not None:
        card = load_recipe(recipe)[0].card
        changes["card"] = card.model_dump(exclude_none=True) if card else {}
    if prompts:
        changes["samples"] = _answers(out, prompts, quiet=quiet)
    with explained_failures(out):
        edit = Edit(out, "page")
        with edit.begun(), edit.interruptible("the model card is as it was"):
            before = _report(out, replace_edited=replace_edited)
            edit.emptied()
            gone = write_report_and_card(edit, before, changes, same_model=True, replace_card=True)
            edit.put_into_place({}, gone)
    if not quiet:
        told = f", with {counted(len(prompts), 'sample')} of what it writes" if prompts else ""
        print(f"The model card {out / CARD} is written anew{told}.")


def _report(out: Path, *, replace_edited: bool) -> Report:
    before = read_report(out)
    if not isinstance(before, Report):
        raise UpitError(
            f"The {REPORT} in {out} has not all that a model card says; a model made, or "
            "made again, with this version has."
        )
    if not replace_edited and (reason := why_kept(out, before)):
        raise UpitError(f"{reason}; add --force to replace it.")
    return before


def _answers(out: Path, prompts: Sequence[str], *, quiet: bool) -> list[dict[str, str]]:
    """Return what the model says to each prompt, with the likeliest tokens."""
    voice = load_voice(str(out), VoiceOptions(quiet=quiet))
    # All are read before one is answered: a mistake shows at once.
    asked = [Conversation(voice).ids(prompt, _SAMPLE_TOKENS) for prompt in prompts]
    answers = []
    bar = tqdm(asked, "answers", unit="sample", disable=quiet)
    for prompt, ids in zip(prompts, bar, strict=True):
        room = _SAMPLE_TOKENS if voice.context is None else voice.context - len(ids)
        answer = voice.speaker.answer(
            ids, lambda *_: None, max_new_tokens=min(_SAMPLE_TOKENS, room), **_GREEDY
        )
        if answer.is_interrupted:
            raise UpitError("Interrupted; the model card is as it was.")
        text = printable(answer.text)
        answers.append({"prompt": prompt, "text": text if answer.is_complete else f"{text} …"})
    return answers
