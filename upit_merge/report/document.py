"""`upit_report.json` of this version: the model it is checked with, and a card is made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictInt, ValidationError, field_validator, model_validator

from upit_merge.errors import UpitError, one_line
from upit_merge.io.untrusted import read_json
from upit_merge.output.staging import REPORT
from upit_merge.report.any_version import (
    AnyExtension,
    AnyLineage,
    AnyReport,
    AnyRouter,
    AnyUnit,
    Part,
)
from upit_merge.report.evaluation_record import Evaluation
from upit_merge.report.sources import Source

Matrix = list[list[float]]


class Mixture(Part):
    """Describes the model as it is now.

    Attributes:
        name: Of its folder when it was made.
        format: Of `formats.FORMATS`.
        parameters, active_parameters: Of the whole model, and those that a token meets.
        tokenizer, chat_template: Whether it came with one.
    """

    name: str
    format: str
    num_layers: int
    num_experts: int
    parameters: int
    active_parameters: int
    tokenizer: bool
    chat_template: bool


class Sources(Part):
    """Names the models that a mixture was made of."""

    base: Source
    checkpoints: list[Source] = Field(min_length=1)


class Expert(Part):
    """Says where an expert comes from; see `merge.lineage.Expert`."""

    checkpoint: int | None
    parents: tuple[int, int] | None
    alpha: float | None
    weights: list[float]


class Unit(AnyUnit):
    """Says where the experts' tensors of one unit come from; see `merge.lineage.Unit`."""

    experts: list[Expert]


class Lineage(AnyLineage):
    """Describes `merge.lineage.Lineage`; `expected_gram` is None for perturbed copies."""

    summary: str
    experts: list[Expert] = Field(min_length=1)
    units: list[Unit] = Field(default_factory=list)  # type: ignore[assignment]  # only read
    expected_gram: Matrix | None = None
    smallest_distance: float | None = None
    mean_distance: float | None = None

    def parts(self, expert: int) -> list[Expert]:
        """Return the ancestry of an expert in every unit that is grown by itself."""
        if not self.units:
            return [self.experts[expert]]
        return [unit.experts[expert] for unit in self.units]


class BucketRow(Part):
    """Tells of one expert's seed samples; losses in nats per token, on them and on all."""

    expert: int
    samples: int
    loss_own: float | None
    loss_all: float | None


class BucketTable(Part):
    """Has a row per expert, how the `losses` were computed, and what the router can gain: `worth`."""

    experts: list[BucketRow]
    losses: dict[str, Any] = Field(default_factory=dict)
    worth: dict[str, Any] = Field(default_factory=dict)


class SeedData(Part):
    """Counts the samples that were used."""

    samples: int


class Router(AnyRouter):
    """Adds what the card says of the seed samples and of refinement."""

    settings: dict[str, Any]
    data: SeedData
    buckets: BucketTable | None = None
    refined: Any = None


class Extension(AnyExtension):
    """Adds what the expert was, and which gates were fitted: `all` or `its own`."""

    gates: str
    source: Source
    router: Router


class Shrinking(Part):
    """Tells of experts that became fewer.

    Attributes:
        how: They were merged, or some dropped.
        groups: Which experts each one was, by mixture; numbered as before.
        extensions: How many experts had been added by then.
        refitted: The gates were fitted anew with it.
    """

    before: int = Field(alias="from")
    after: int = Field(alias="to")
    data: SeedData
    how: Literal["merge", "drop"] = "merge"
    groups: list[list[list[StrictInt]]] = Field(default_factory=list)
    extensions: int = 0
    refitted: bool = False

    def kept(self) -> dict[int, dict[int, list[int]]]:
        """Return the mixtures in which an old expert is left, by its number then and now."""
        found: dict[int, dict[int, list[int]]] = {}
        for mixture, row in enumerate(self.groups):
            for number, members in enumerate(row):
                for old in members:
                    found.setdefault(old, {}).setdefault(number, []).append(mixture)
        return found


class Step(Part):
    """Names a command that changed the model after it was made."""

    command: str


class LossPoint(Part):
    """Has the loss, in nats per token, and the routing at one step of the post-training."""

    step: int
    loss: float
    routing_entropy: float | None = None
    dead_experts: int | None = None


class PostTraining(Part):
    """Tells of `upit-merge finetune` of the mixture; `seconds` of wall time."""

    settings: dict[str, Any] = Field(default_factory=dict)
    data: str | None = None
    samples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    history: list[LossPoint] = Field(default_factory=list)


class OwnersCard(Part):
    """Has what the recipe's `card:` block says; see `config.card.CardSettings`."""

    name: str | None = None
    license: str | None = None
    language: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)


class Sample(Part):
    """Has what the model wrote once, and what it was asked."""

    prompt: str
    text: str


class Report(AnyReport):
    """The report that this version writes, with all that a card says; older ones have less."""

    versions: dict[str, str]
    seed: StrictInt
    seed_option: int | None = None
    dtype: str
    experts_per_token: int
    parameters: dict[str, Any]
    checkpoint_cosine: Matrix
    lineage: Lineage
    model: Mixture
    sources: Sources
    router: Router | None
    extensions: list[Extension] = Field(default_factory=list)  # type: ignore[assignment]  # only read
    shrunk: list[Shrinking] = Field(default_factory=list)
    history: list[Step] = Field(default_factory=list)
    post_training: PostTraining | None = None
    evaluation: Evaluation | None = None
    card: OwnersCard = OwnersCard()
    samples: list[Sample] = Field(default_factory=list)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _of_this_mixture(cls, value: Any) -> Any:
        """Ignore results of other models alone, which some command may have left."""
        return None if isinstance(value, Mapping) and "groups" not in value else value

    @model_validator(mode="after")
    def _fits_together(self) -> Report:
        """Check that every number points at something: reports may come from anywhere."""
        m, n = len(self.sources.checkpoints), len(self.lineage.experts)
        ancestors = [self.lineage.experts, *(unit.experts for unit in self.lineage.units)]
        for experts in ancestors:
            if len(experts) != n:
                raise ValueError("a unit has other experts than the lineage")
            for index, expert in enumerate(experts):
                if not _points_back(expert, index, m):
                    raise ValueError(f"expert {index} descends from what is not there")
        _check_square(self.checkpoint_cosine, m)
        if self.lineage.expected_gram is not None:
            _check_square(self.lineage.expected_gram, n)
        return self

    @property
    def name(self) -> str:
        """Return what the model is called."""
        return self.card.name or self.model.name

    @property
    def is_copied(self) -> bool:
        """Tell whether the experts are copies of dense models, and not grown."""
        return self.parameters.get("expansion") == "copy"

    @property
    def later_extensions(self) -> Sequence[Extension]:
        """Return the experts that were added and have not been merged with others since."""
        return self.extensions[self.shrunk[-1].extensions :] if self.shrunk else self.extensions

    @cached_property
    def all_sources(self) -> list[Source]:
        """Return the base, the checkpoints, and what was added later."""
        added = (extension.source for extension in self.extensions)
        return [self.sources.base, *self.sources.checkpoints, *added]

    def changes(self) -> Iterator[tuple[str, Extension | Shrinking | None]]:
        """Yield what was done to the model since it was made: the command and its record."""
        records: dict[str, Iterator[Extension | Shrinking]] = {
            "extend": iter(self.extensions),
            "shrink": iter(self.shrunk),
        }
        for step in self.history:
            yield step.command, next(records.get(step.command, iter(())), None)


def _points_back(expert: Expert, index: int, num_checkpoints: int) -> bool:
    checkpoint = 0 if expert.checkpoint is None else expert.checkpoint
    known = 0 <= checkpoint < num_checkpoints and len(expert.weights) == num_checkpoints
    return known and all(0 <= parent < index for parent in expert.parents or ())


def _check_square(matrix: Matrix, size: int) -> None:
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise ValueError(f"a matrix of {size} rows has another shape")


def describe(document: Mapping[str, Any]) -> AnyReport:
    """Return the content of a report as a `Report`, unless it has not all that a card says.

    Raises:
        ValidationError: it is nothing that any version would write.
    """
    with contextlib.suppress(ValidationError):
        return Report.model_validate(document)
    return AnyReport.model_validate(document)


def read_report(out: Path) -> AnyReport:
    """Read the report of a model's folder; an empty one if there is none.

    Raises:
        UpitError: there is one, but nothing that this program would write.
    """
    path = out / REPORT
    if not path.is_file():
        return AnyReport()
    document = read_json(path, f"the output {out}")
    try:
        return describe(document)
    except ValidationError as error:
        detail = error.errors()[0]
        where = one_line(".".join(map(str, detail["loc"])))
        raise UpitError(
            f"{path} is not the report of a upit run ({where}: {one_line(detail['msg'])}); put the "
            "original back, or remove it."
        ) from None


def after(
    before: AnyReport, command: str, changes: Mapping[str, Any], digest: str | None = None
) -> AnyReport:
    """Return the report of the model that a command made of the one `before` speaks of.

    What was evaluated, and what wrote, was the model before: that goes, unless `changes` has new.

    Args:
        digest: By which the same call is known.
    """
    step = {"command": command, **({"run_sha256": digest} if digest else {})}
    history = [*before.document.get("history", []), step]
    document = {**before.document, **changes, "history": history}
    for key in ("evaluation", "samples"):
        if key not in changes:
            document.pop(key, None)
    return describe(document)
