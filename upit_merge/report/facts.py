"""What a model page is made from: the report of a model, typed and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from upit_merge.report.sources import Source

Matrix = list[list[float]]


class _Facts(BaseModel):
    """Of a report, which has more than a page needs."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Mixture(_Facts):
    """The model as it is now.

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


class Sources(_Facts):
    base: Source
    checkpoints: list[Source] = Field(min_length=1)


class Expert(_Facts):
    """See `expansion.lineage.Expert`."""

    checkpoint: int | None
    parents: tuple[int, int] | None
    alpha: float | None
    weights: list[float]


class Unit(_Facts):
    name: str
    experts: list[Expert]


class Lineage(_Facts):
    """See `expansion.lineage.Lineage`; `expected_gram` is None for perturbed copies."""

    summary: str
    experts: list[Expert] = Field(min_length=1)
    units: list[Unit] = []
    expected_gram: Matrix | None = None
    smallest_distance: float | None = None
    mean_distance: float | None = None

    def parts(self, expert: int) -> list[Expert]:
        """The ancestry of an expert in every unit that is grown by itself."""
        if not self.units:
            return [self.experts[expert]]
        return [unit.experts[expert] for unit in self.units]


class BucketRow(_Facts):
    expert: int
    samples: int
    loss_own: float | None
    loss_all: float | None


class BucketTable(_Facts):
    experts: list[BucketRow]
    worth: dict[str, Any] = {}


class SeedData(_Facts):
    samples: int


class Router(_Facts):
    settings: dict[str, Any]
    data: SeedData
    buckets: BucketTable | None = None
    refined: Any = None


class Extension(_Facts):
    expert: int
    gates: str
    source: Source
    router: Router


class Shrinking(_Facts):
    """`extensions` is how many there had been by then."""

    before: int = Field(alias="from")
    after: int = Field(alias="to")
    data: SeedData
    extensions: int = 0


class Step(_Facts):
    """A command that changed the model after it was made."""

    command: str


class LossPoint(_Facts):
    step: int
    loss: float
    routing_entropy: float | None = None
    dead_experts: int | None = None


class PostTraining(_Facts):
    """`upit-merge finetune` of the mixture; `seconds` of wall time."""

    settings: dict[str, Any] = {}
    data: str | None = None
    samples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    history: list[LossPoint] = []


class GroupResult(_Facts):
    """A kind of held-out text; `routing` is the mean over the layers, (num_experts,)."""

    samples: int
    targets: int
    perplexity: float
    routing: list[float] = Field(min_length=1)
    experts_alone: list[float] | None = None
    best_expert_per_sample: float | None = None
    control_perplexity: float | None = None


class OtherModel(_Facts):
    """Another model on the same text."""

    model: str
    perplexity: float
    groups: dict[str, float] = {}


class Evaluation(_Facts):
    """What `upit-merge evaluate --card` found.

    Attributes:
        data: What the text is called.
        whole: The name of the group of all samples.
        by_layer: Share of the routed places over all text, (num_layers, num_experts).
        dead_places: Experts with less than a tenth of an even share, counted in every layer.
    """

    data: str
    whole: str
    groups: dict[str, GroupResult]
    by_layer: Matrix = Field(min_length=1)
    dead_places: int
    entropy: dict[str, float]
    agreement: dict[str, float] | None = None
    others: list[OtherModel] = []

    @model_validator(mode="after")
    def _has_its_parts(self) -> Evaluation:
        if self.whole not in self.groups:
            raise ValueError("has no group of all samples")
        if (
            len({len(row) for row in [*self.by_layer, *(g.routing for g in self.groups.values())]})
            != 1
        ):
            raise ValueError("has rows of several lengths")
        return self

    @property
    def kinds(self) -> dict[str, GroupResult]:
        """The groups that are kinds of text; all text, if it is of one kind."""
        found = {name: group for name, group in self.groups.items() if name != self.whole}
        return found or dict(self.groups)


class Facts(_Facts):
    """Of a report, all that its page says; a report of an older version has less."""

    versions: dict[str, str]
    seed: int
    seed_option: int | None = None
    dtype: str
    experts_per_token: int
    parameters: dict[str, Any]
    checkpoint_cosine: Matrix
    lineage: Lineage
    model: Mixture
    sources: Sources
    router: Router | None
    extensions: list[Extension] = []
    shrunk: list[Shrinking] = []
    history: list[Step] = []
    post_training: PostTraining | None = None
    evaluation: Evaluation | None = None

    @field_validator("evaluation", mode="before")
    @classmethod
    def _of_this_mixture(cls, value: Any) -> Any:
        """Results of other models alone, which some command may have left, are no evaluation."""
        return value if isinstance(value, Mapping) and "groups" in value else None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Facts | None:
        """The facts of a report; None if it has not all of them, as older ones."""
        try:
            return cls.model_validate(report)
        except ValidationError:
            return None

    @model_validator(mode="after")
    def _fits_together(self) -> Facts:
        """Every number that points at something must; reports may come from anywhere."""
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
    def is_copied(self) -> bool:
        """Whether the experts are copies of dense models, and not grown."""
        return self.parameters.get("expansion") == "copy"

    @property
    def later_extensions(self) -> Sequence[Extension]:
        """Experts that were added and have not been merged with others since."""
        return self.extensions[self.shrunk[-1].extensions :] if self.shrunk else self.extensions

    @cached_property
    def all_sources(self) -> list[Source]:
        """The base, the checkpoints, and what was added later."""
        added = (extension.source for extension in self.extensions)
        return [self.sources.base, *self.sources.checkpoints, *added]

    def changes(self) -> Iterator[tuple[str, Extension | Shrinking | None]]:
        """What was done to the model since it was made, in order: the command and its record."""
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
