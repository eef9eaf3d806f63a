"""What commands rely on in `upit_report.json`, whichever version wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetPydanticSchema,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictInt,
    StrictStr,
    model_validator,
)

from upit_merge.config.router import RouterSettings

# An object of JSON, with whatever keys. For mypy it is anything, so that a list of them may become
# one of something narrower.
Object = Annotated[Any, GetPydanticSchema(lambda _source, handler: handler(dict[str, Any]))]


class Part(BaseModel):
    """A part of a report, which may have more in it than is named here."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class AnyUnit(Part):
    """Names a unit of any version's report."""

    name: StrictStr
    experts: list[Object]


class AnyLineage(Part):
    """Lists the experts of any version's report."""

    experts: list[Object]
    units: list[AnyUnit] = []


class AnyRouter(Part):
    """Says how the gates were fitted, in any version's report."""

    settings: dict[str, Any] = {}
    compute: str | None = None
    seed: StrictInt | None = None
    data: Object = {}
    gates_sha256: StrictStr | None = None
    experts_sha256: list[StrictStr] | None = None
    chosen: Object = {}

    def fit(self) -> tuple[RouterSettings, int] | None:
        """Return settings and seed of the fit; None if they are not in this version's words."""
        if self.seed is None:
            return None
        try:
            # Versions before there was a choice computed exact losses.
            settings = RouterSettings.model_validate({"losses": "exact", **self.settings})
            if settings.temperature is None:  # with the one that was chosen the fit is the same
                known = {"temperature": self.chosen.get("temperature", 1.0)}
                settings = RouterSettings.model_validate({**settings.model_dump(), **known})
            return settings, self.seed
        except (TypeError, ValueError):  # pydantic's own is a ValueError
            return None


class AnyExtension(Part):
    """Tells of an expert that was added, in any version's report."""

    expert: StrictInt
    sha256: StrictStr
    router: AnyRouter


class CardFiles(Part):
    """Lists the card's pictures, and digests its text as it was written."""

    sha256: StrictStr | None = None
    pictures: list[StrictStr] = []


class AnyReport(Part):
    """A report of whichever version, with what commands rely on; empty if there is none.

    What it was read from is kept: changes are made to that document, so that keys stay in their
    order, and those that nobody here knows stay too.
    """

    seed: StrictInt = 0
    checkpoints: list[StrictStr] = []
    files: list[StrictStr] = []
    lineage: AnyLineage | None = None
    router: AnyRouter | None = None
    extensions: list[AnyExtension] = []
    shrunk: list[Object] = []
    history: list[Object] = []
    page: CardFiles | None = None
    evaluation: Object | None = None
    versions: dict[str, Any] = {}

    _document: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_document(cls, value: Any, handler: ModelWrapValidatorHandler[AnyReport]) -> AnyReport:
        report = handler(value)
        report._document = dict(value)
        return report

    @property
    def document(self) -> Mapping[str, Any]:
        """Return the JSON object that this describes."""
        return self._document

    @property
    def pictures(self) -> Sequence[str]:
        """Return the names of the card's pictures."""
        return self.page.pictures if self.page else ()
