"""`upit-merge router`: train the gates of an MoE that is already there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upit_merge.device import resolve_device
from upit_merge.errors import UpitError
from upit_merge.recipe import RouterSettings
from upit_merge.report.record import write_json
from upit_merge.report.tables import bucket_table, show
from upit_merge.router.gate_files import opened_moe, replace_gates
from upit_merge.router.pretrain import RouterResult, load_seed_set, pretrain_router
from upit_merge.staging import REPORT, STAGING, exclusive
from upit_merge.tokenizer import load_tokenizer

LOG = logging.getLogger(__name__)


def parse_settings(values: dict[str, Any]) -> RouterSettings:
    """Router settings from command line values; `sample` is a count or a fraction in text.

    Raises:
        UpitError: naming the option and what would work.
    """
    values = {key: value for key, value in values.items() if value is not None}
    if isinstance(text := values.get("sample"), str):
        try:
            values["sample"] = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise UpitError(
                f"--sample is {text!r}; give a count such as 500 or a fraction such as 0.01."
            ) from None
    try:
        return RouterSettings.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        option = str(detail["loc"][0]).replace("_", "-")
        message = detail["msg"].removeprefix("Input should be ")
        raise UpitError(f"--{option} is {detail['input']!r}; it should be {message}.") from None


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
        tokenizer = load_tokenizer(out, trust_remote_code=trust_remote_code)
        seeds = load_seed_set(
            settings,
            tokenizer,
            context=moe.config.get("max_position_embeddings", 1 << 30),
            vocab_size=moe.config.get("vocab_size", 0),
            seed=seed,
        )
        staging = out / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            result = pretrain_router(
                moe,
                seeds,
                settings,
                seed=seed,
                device=resolve_device(device),
                scratch=staging,
                quiet=quiet,
            )
            replace_gates(out, staging, result.gates)
            _update_report(out, result, settings)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if not quiet:
        if buckets := result.report.get("buckets"):
            show(bucket_table(buckets["experts"]))
        print(f"The gates in {out} are replaced.")
    return result


def _update_report(out: Path, result: RouterResult, settings: RouterSettings) -> None:
    path = out / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        LOG.info("%s has no %s; it is not updated.", out, REPORT)
        return
    report["router"] = result.report | {"settings": settings.model_dump(mode="json")}
    write_json(path, report)
