"""`upit-merge router`: train the gates of an MoE that is already there."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upit_merge.device import resolve_device
from upit_merge.errors import UpitError
from upit_merge.interrupt import ends_at_once
from upit_merge.recipe import RouterSettings
from upit_merge.recipe_errors import explain
from upit_merge.report.card import router_sentence, with_router_sentence
from upit_merge.report.tables import bucket_table, show
from upit_merge.router.gate_files import opened_moe, replace_gates
from upit_merge.router.layerwise import LayerwiseMoe
from upit_merge.router.pretrain import RouterResult, load_seed_set, pretrain_router
from upit_merge.staging import REPORT, exclusive, remove_scratch, scratch_folder
from upit_merge.text_files import replace_text, write_json
from upit_merge.tokenizer import load_tokenizer

LOG = logging.getLogger(__name__)

_NUMBERS = ("sample", "max_length", "temperature", "batch_tokens", "memory_gb")


def parse_settings(values: dict[str, Any]) -> RouterSettings:
    """Router settings from command line values, numbers among them as text.

    Raises:
        UpitError: naming the option and what would work.
    """
    values = {
        key: _number(value) if key in _NUMBERS else value
        for key, value in values.items()
        if value is not None
    }
    try:
        return RouterSettings.model_validate(values)
    except ValidationError as error:
        key, rest = explain(error, values, {"": RouterSettings}).split(" ", 1)
        raise UpitError(f"--{key.replace('_', '-')} {rest}.") from None


def _number(text: str) -> int | float | str:
    """Text as the number it is: `sample` takes a count (500) or a fraction (0.01)."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def train_router(
    out: Path,
    settings: RouterSettings,
    *,
    seed: int,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
) -> RouterResult:
    """Replace the gates of the Mixtral folder `out` by ones fitted to seed data.

    Raises:
        UpitError: `out` is no Mixtral folder with a tokenizer, or the data does not fit.
    """
    if not out.is_dir():
        raise UpitError(f"The folder {out} does not exist; give the output of a upit recipe.")
    with exclusive(out), opened_moe(out, str(out)) as moe:
        model = LayerwiseMoe(moe, resolve_device(device))
        tokenizer = load_tokenizer(out, trust_remote_code=trust_remote_code)
        seeds = load_seed_set(
            settings,
            tokenizer,
            context=model.context,
            vocab_size=model.vocab_size,
            seed=seed,
        )

        def last_words() -> str:
            remove_scratch(out)
            return "Interrupted; the gates are as they were."

        with scratch_folder(out) as scratch:
            with ends_at_once(last_words):
                result = pretrain_router(
                    model, seeds, settings, seed=seed, scratch=scratch, quiet=quiet
                )
            replace_gates(out, scratch, result.gates)
            _update_papers(out, result)
    if not quiet:
        print(seeds.summary())
        if buckets := result.report.get("buckets"):
            show(bucket_table(buckets["experts"]))
        print(f"The gates in {out} are replaced.")
    return result


def _update_papers(out: Path, result: RouterResult) -> None:
    """Make the card and the report say what the gates are now, where they are ours."""
    card = out / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        replace_text(card, with_router_sentence(text, router_sentence(result.report)))
    path = out / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        LOG.info("%s has no %s; it is not updated.", out, REPORT)
        return
    report["router"] = result.report
    write_json(path, report)
