"""What a report keeps of an evaluation, and a card is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, StrictInt, model_validator

from upit_merge.report.any_version import Part


class GroupResult(Part):
    """Has the results on a kind of held-out text.

    Attributes:
        routing: Every expert's share of the routed places, the mean over layers, (num_experts,).
        experts_alone: Perplexity of every expert as a dense model, (num_experts,).
    """

    samples: int
    targets: int
    perplexity: float
    routing: list[float] = Field(min_length=1)
    experts_alone: list[float] | None = None
    best_expert_per_sample: float | None = None
    control_perplexity: float | None = None


class Paired(Part):
    """Compares the mixture with another model, paired by sample.

    Attributes:
        gain: How much lower the mixture's loss is, nats per token.
        error: The margin of error of that; None if it is not known.
        samples: How many there are; none where this was not measured.
    """

    gain: float | None = None
    error: float | None = None
    samples: int = 0


class OtherModel(Paired):
    """Has the results of another model on the same text."""

    model: str
    perplexity: float
    groups: dict[str, float] = Field(default_factory=dict)


class PairedGroup(Paired):
    """Has the results of a rival on a kind of text."""

    perplexity: float | None = None


class RivalResult(Paired):
    """Has the results of a model that one could have in the mixture's place.

    Attributes:
        kind: See `router.worth.Rival`.
        facts: More of it in numbers.
    """

    kind: str
    name: str
    perplexity: float | None = None
    facts: dict[str, float] = Field(default_factory=dict)
    groups: dict[str, PairedGroup] = Field(default_factory=dict)


class WorthRecord(Part):
    """Says whether the mixture is worth its bytes, see `router.worth.Worth`.

    Attributes:
        outcome: `worth`, `not_worth` or `too_few`.
        verdict: The same in words.
        left_out: What could not be compared, and why; and why there is no recipe of what is advised.
        recipe: mergekit's, of the model that is to be used instead.
    """

    outcome: str
    verdict: str
    rivals: list[RivalResult] = Field(default_factory=list)
    left_out: str | None = None
    recipe: str | None = None


class HardlyUsed(Part):
    """Names the experts that the gates hardly use over all layers, and what they take on disk."""

    experts: list[StrictInt]
    bytes: int = 0


class Evaluation(Part):
    """Keeps what `upit-merge evaluate --card` measured.

    Attributes:
        data: What the text is called.
        whole: The name of the group of all samples.
        by_layer: Share of the routed places over all text, (num_layers, num_experts).
        dead_places: Experts with less than a tenth of an even share, counted in every layer.
        estimated: Whether the single experts' perplexities are losses to first order.
        worth: None in reports of versions before there was one, or if it was not asked for.
    """

    data: str
    whole: str
    groups: dict[str, GroupResult]
    by_layer: list[list[float]] = Field(min_length=1)
    dead_places: int
    entropy: dict[str, float]
    agreement: dict[str, float] | None = None
    estimated: bool = False
    others: list[OtherModel] = Field(default_factory=list)
    worth: WorthRecord | None = None
    hardly_used: HardlyUsed | None = None

    @model_validator(mode="after")
    def _has_its_parts(self) -> Evaluation:
        if self.whole not in self.groups:
            raise ValueError("has no group of all samples")
        rows = [*self.by_layer, *(group.routing for group in self.groups.values())]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("has rows of several lengths")
        return self

    @property
    def kinds(self) -> dict[str, GroupResult]:
        """Return the groups that are kinds of text; all text, if it is of one kind."""
        kinds = {name: group for name, group in self.groups.items() if name != self.whole}
        return kinds or dict(self.groups)

    @property
    def columns(self) -> list[str]:
        """Return the names of the kinds of text, and last that of all of it."""
        return [*(name for name in self.groups if name != self.whole), self.whole]

    @property
    def earlier_others(self) -> Sequence[OtherModel]:
        """Return the models that an earlier call has compared, which the verdict knows nothing of."""
        judged = [] if self.worth is None else [rival.name for rival in self.worth.rivals]
        return [other for other in self.others if other.model not in judged]


def with_earlier_others(earlier: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation with the other models that were measured on the same text before.

    Args:
        earlier, record: As they are in the report.
    """
    if earlier.get("samples_sha256") != record["samples_sha256"]:
        return record
    now = record.get("others", [])
    names = [other["model"] for other in now]
    kept = [other for other in earlier.get("others", []) if other.get("model") not in names]
    return {**record, "others": [*kept, *now]}
