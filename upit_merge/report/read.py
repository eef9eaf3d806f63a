"""`upit_report.json` of a model that is there, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictInt, StrictStr, ValidationError

from upit_merge.config.router import RouterSettings
from upit_merge.errors import UpitError, one_line
from upit_merge.io.untrusted import read_json
from upit_merge.output.staging import REPORT

Weights = list[dict[str, Any]]


class _Unit(BaseModel):
    name: StrictStr
    experts: Weights


class _Lineage(BaseModel):
    experts: Weights
    units: list[_Unit] = []


class _Router(BaseModel):
    settings: dict[str, Any] = {}
    seed: StrictInt | None = None
    data: dict[str, Any] = {}
    gates_sha256: StrictStr | None = None
    experts_sha256: list[StrictStr] | None = None


class _Extension(BaseModel):
    expert: StrictInt
    sha256: StrictStr
    router: _Router


class _Page(BaseModel):
    sha256: StrictStr | None = None
    pictures: list[StrictStr] = []


class _Report(BaseModel):
    """What commands rely on; reports have more, and older ones less."""

    seed: StrictInt = 0
    checkpoints: list[StrictStr] = []
    files: list[StrictStr] = []
    lineage: _Lineage | None = None
    router: _Router | None = None
    extensions: list[_Extension] = []
    shrunk: Weights = []
    history: Weights = []
    page: _Page | None = None
    evaluation: dict[str, Any] | None = None
    versions: dict[str, Any] = {}


def read_report(out: Path) -> dict[str, Any]:
    """The report of a model's folder; empty if it has none.

    Raises:
        UpitError: there is one, but nothing that this program would write.
    """
    path = out / REPORT
    if not path.is_file():
        return {}
    report = read_json(path, f"the output {out}")
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        detail = error.errors()[0]
        where = one_line(".".join(map(str, detail["loc"])))
        raise UpitError(
            f"{path} is not the report of a upit run ({where}: {one_line(detail['msg'])}); put the "
            "original back, or remove it."
        ) from None
    return report


def recorded_router(told: Mapping[str, Any] | None) -> tuple[RouterSettings, int] | None:
    """Settings and seed of gates that were fitted, from the router's part of a report.

    None if they are not there, or not in this version's words.
    """
    try:
        return RouterSettings.model_validate((told or {})["settings"]), int((told or {})["seed"])
    except (KeyError, TypeError, ValueError):  # pydantic's own is a ValueError
        return None
