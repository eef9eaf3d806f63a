"""Whether a mixture is better than the dense models one can make of the same checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from upit_merge.router.paired import FEWEST, SMALL, Gain, Outcome, paired_gain

Kind = Literal["base", "single", "average", "sum", "random", "other"]
Ours = Literal["mixture", "choice"]

# More samples than this nobody will look for.
MOST = 10_000
# What is simpler to make comes first.
_SIMPLEST = ("base", "single", "average", "sum", "other")


@dataclass(frozen=True)
class Rival:
    """A model that the mixture is compared with.

    Attributes:
        kind: The base, one checkpoint, the checkpoints' average, base and a scaled sum of their
            deltas, the mixture with gates that know nothing, or something else.
        name: As it is spoken of in the middle of a sentence.
        sums: Negative log-likelihood in nats, summed over a sample's targets, float64,
            (num_samples,); NaN where it was not measured, or where something was chosen by it.
        facts: More of it in numbers, such as `scale`, or the index of the `checkpoint`.
    """

    kind: Kind
    name: str
    sums: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether it could be used in place of a mixture; random gates take as many bytes."""
        return self.kind != "random"


@dataclass(frozen=True)
class Worth:
    """A mixture beside its rivals, paired by sample.

    Attributes:
        ours: Nats summed over a sample's targets, float64, (num_samples,); NaN where unknown.
        targets: Target tokens of every sample, float64, (num_samples,).
        rivals: What it is compared with.
        groups: Indices of the samples of each kind of text; none if there is one kind.
        bytes_ours, bytes_dense: What the mixture and a dense model take on disk.
        ours_kind: The mixture itself, or the best checkpoint for each sample: what a mixture's
            router is to choose, before there is one.
        given: How many samples there were, if ours is known of fewer because losses were computed
            to first order.
    """

    ours: Tensor
    targets: Tensor
    rivals: Sequence[Rival]
    groups: Mapping[str, Sequence[int]]
    bytes_ours: int
    bytes_dense: int
    ours_kind: Ours
    given: int | None = None

    @classmethod
    def of(
        cls,
        ours: Tensor,
        targets: Tensor,
        rivals: Sequence[Rival],
        groups: Mapping[str, Sequence[int]] | None = None,
        *,
        bytes_ours: int,
        bytes_dense: int,
        ours_kind: Ours,
        given: int | None = None,
    ) -> Worth:
        """Compare; rivals without a sample that ours is known of are left out.

        Args:
            groups: Of one kind of text, or of none, nothing is told apart.
        """
        ours, targets = ours.double(), targets.double()
        met = [r for r in rivals if bool((r.sums.isfinite() & ours.isfinite()).any())]
        several = groups if groups and len(groups) > 1 else {}
        return cls(ours, targets, met, several, bytes_ours, bytes_dense, ours_kind, given)

    # ---- numbers ---------------------------------------------------------------------------

    def gain(self, rival: Rival, group: str | None = None) -> Gain:
        """Return our gain over a rival, on all samples or those of a group."""
        difference = rival.sums.double() - self.ours
        if group is None:
            return paired_gain(difference, self.targets, [*self.groups.values()])
        rows = self._rows(group)
        return paired_gain(difference[rows], self.targets[rows])

    def _rows(self, group: str) -> Tensor:
        return torch.tensor([*self.groups[group]], dtype=torch.int64)

    @cached_property
    def _gains(self) -> list[tuple[Rival, Gain]]:
        return [(rival, self.gain(rival)) for rival in self.rivals]

    @property
    def samples(self) -> int:
        """How many samples ours is known of."""
        return int(self.ours.isfinite().sum())

    @cached_property
    def _dense(self) -> list[tuple[Rival, Gain]]:
        """Rivals that could be used instead, without those of too few samples beside others."""
        dense = [(rival, gain) for rival, gain in self._gains if rival.is_dense]
        most = max((gain.samples for _rival, gain in dense), default=0)
        return [found for found in dense if found[1].samples >= min(FEWEST, most)]

    @cached_property
    def _best(self) -> tuple[Rival, Gain] | None:
        return min(self._dense, key=_nats, default=None)

    @property
    def best(self) -> Rival | None:
        """The dense rival with the lowest loss, compared by way of ours."""
        return self._best[0] if self._best else None

    @cached_property
    def outcome(self) -> Outcome:
        """What is to be said: worth it against every dense rival, or not against one of them."""
        outcomes = {gain.outcome for _rival, gain in self._dense}
        if "not_worth" in outcomes:
            return "not_worth"
        return "worth" if outcomes == {"worth"} else "too_few"

    @cached_property
    def advised(self) -> Rival | None:
        """The simplest dense rival that is as good as the best, within noise and 1 %.

        Where the mixture is not worth it, of those that it is not worth it against.
        """
        against = [
            found
            for found in self._dense
            if self.outcome != "not_worth" or found[1].outcome == "not_worth"
        ]
        if not against:
            return None
        best, _gain = min(against, key=_nats)
        for kind in _SIMPLEST:
            equals = []
            for rival, gain in against:
                if rival.kind != kind:
                    continue
                difference = rival.sums.double() - best.sums.double()
                behind = paired_gain(difference, self.targets, [*self.groups.values()])
                if rival is best or (behind.nats < min(behind.error, SMALL)):
                    equals.append((rival, gain))
            if equals:
                return min(equals, key=_nats)[0]
        return best

    @cached_property
    def _deciding(self) -> tuple[Rival, Gain] | None:
        """The rival that the outcome rests on."""
        if self.outcome == "not_worth" and self.advised is not None:
            return self.advised, self.gain(self.advised)
        if self.outcome == "too_few":  # the one that could still be the better model
            return min(self._dense, key=lambda found: found[1].nats - found[1].error, default=None)
        return self._best

    @property
    def needed(self) -> int | None:
        """How many samples would tell, two digits of them; None if that is known, or nobody's guess."""
        if self.outcome != "too_few" or self._deciding is None:
            return None
        gain = self._deciding[1]
        # Rivals may have been measured on a part of the samples.
        number = gain.needed * self.samples / max(1, gain.samples)
        if not math.isfinite(number):
            return None
        number = max(number, self.samples + 1)
        unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
        return math.ceil(number / unit) * unit

    def group_outcomes(self) -> dict[str, Outcome]:
        """Return what each group says of the rival that decides, where that is another answer."""
        if self._deciding is None:
            return {}
        found = {name: self.gain(self._deciding[0], name).outcome for name in self.groups}
        return {name: o for name, o in found.items() if o not in ("too_few", self.outcome)}

    # ---- words -----------------------------------------------------------------------------

    def verdict(self, quoted: Callable[[str], str] = str) -> str:
        """Return one paragraph: worth it, not worth it, or too few samples to tell.

        Args:
            quoted: Makes a name or a group, which come from elsewhere, fit to be shown.
        """
        if self._deciding is None:
            return (
                "Nothing was measured beside the mixture, so nothing says whether it is worth it."
            )
        rival, gain = self._deciding
        name = quoted(rival.name)
        sentences = [
            {"worth": self._worth, "not_worth": self._not_worth, "too_few": self._too_few}[
                self.outcome
            ](name, rival, gain)
        ]
        sentences += self._of_groups(name, rival, quoted)
        return " ".join([*sentences, *self._of_random_gates()])

    def _subject(self) -> str:
        if self.ours_kind == "mixture":
            return "the mixture"
        return "the best checkpoint for each sample, which a router would have to find,"

    @property
    def _times(self) -> str:
        times = self.bytes_ours / max(1, self.bytes_dense)
        return f"{times:{'.0f' if times >= 10 else '.2g'}} times the bytes"

    def _worth(self, name: str, rival: Rival, gain: Gain) -> str:
        of = "that was measured" if rival.kind == "other" else "of the same checkpoints"
        of = "of its experts" if _is_of_experts(rival) else of
        told = (
            f"Worth it: {self._subject()} has a perplexity {gain} than {name}, the "
            f"best dense model {of}, for {self._times} "
            f"({gain.samples:,} samples)."
        )
        if self.ours_kind == "choice":
            told += " How much of that the router gets, `upit-merge evaluate` tells."
        return told

    def _not_worth(self, name: str, rival: Rival, gain: Gain) -> str:
        if gain.nats + gain.error < 0:
            found = f"a perplexity {gain} than {name}"
        else:
            found = f"no lower a perplexity than {name} that would pay ({gain})"
        instead = {
            "base": "use the base as it is, as nothing that was made of it is better here",
            "single": "use that checkpoint as it is",
            "average": "use the average",
            "sum": "use that sum",
        }.get(rival.kind, "use that model")
        if _is_of_experts(rival):
            which = f"--expert {rival.facts['expert']}" if rival.kind == "single" else "--average"
            instead = f"use that instead (`upit-merge extract MIXTURE DENSE {which}` writes it)"
        return (
            f"Not worth it: {self._subject()} has {found}, for {self._times} "
            f"({gain.samples:,} samples); {instead}."
        )

    def _too_few(self, name: str, _rival: Rival, gain: Gain) -> str:
        told = (
            f"Too few samples to tell whether the mixture is worth {self._times}: on "
            f"{gain.samples:,} of them {self._subject()} has a perplexity {gain} than "
            f"{name}"
        )
        if self.needed is None:
            return f"{told}; give more, at least {FEWEST}."
        if self.needed > MOST:
            return f"{told}; it would take more than {MOST:,}, so the two are as good as the same."
        if self.given is not None and self.needed <= self.given:
            return (
                f"{told}; on the others losses are estimates, and `losses: exact` in the recipe's "
                f"router block would compute them on all {self.given:,}."
            )
        return f"{told}; about {self.needed:,} would do."

    def _of_groups(self, name: str, rival: Rival, quoted: Callable[[str], str]) -> Iterator[str]:
        words = {"worth": "lower", "not_worth": "no lower"}
        for outcome in ("worth", "not_worth"):
            names = [group for group, found in self.group_outcomes().items() if found == outcome]
            if names:
                told = ", ".join(f"{quoted(group)} ({self.gain(rival, group)})" for group in names)
                yield f"Its perplexity is {words[outcome]} than with {name} on {told}."

    def _of_random_gates(self) -> Iterator[str]:
        for rival, gain in self._gains:
            if rival.kind != "random" or gain.outcome == "too_few":
                continue
            if gain.outcome == "not_worth":
                yield f"Gates that know nothing do as well ({gain} than with them)."

    # ---- plain data ------------------------------------------------------------------------

    def perplexity(self, rival: Rival | None = None, group: str | None = None) -> float | None:
        """Return our perplexity, or a rival's as it would be on all samples that ours is known of.

        A rival measured on some of them is taken to be as far from ours on the others; so are all
        numbers those of the same text.
        """
        rows = torch.arange(len(self.ours)) if group is None else self._rows(group)
        rows = rows[self.ours[rows].isfinite()]
        if not len(rows):
            return None
        loss = float(self.ours[rows].sum() / self.targets[rows].sum())
        if rival is not None:
            loss += self.gain(rival, group).nats
        if not math.isfinite(loss) or loss > 700:
            return None
        return math.exp(loss)

    def to_report(self) -> dict[str, Any]:
        """Return plain numbers and the verdict; what could not be measured is None."""
        deciding = self._deciding
        return {
            "ours": self.ours_kind,
            "outcome": self.outcome,
            "verdict": self.verdict(),
            "against": deciding[0].name if deciding else None,
            "gain": _number(deciding[1].nats) if deciding else None,
            "error": _number(deciding[1].error) if deciding else None,
            "samples": deciding[1].samples if deciding else 0,
            "needed": self.needed,
            "best": self.best.name if self.best else None,
            "bytes": {"ours": self.bytes_ours, "dense": self.bytes_dense},
            "perplexity": self.perplexity(),
            "groups": {name: self.perplexity(group=name) for name in self.groups},
            "rivals": [self._reported(rival, gain) for rival, gain in self._gains],
        }

    def _reported(self, rival: Rival, gain: Gain) -> dict[str, Any]:
        groups = {}
        for name in self.groups:
            found = self.gain(rival, name)
            groups[name] = {
                "perplexity": self.perplexity(rival, name),
                "gain": _number(found.nats),
                "error": _number(found.error),
                "samples": found.samples,
            }
        return {
            "kind": rival.kind,
            "name": rival.name,
            "facts": dict(rival.facts),
            "perplexity": self.perplexity(rival),
            "gain": _number(gain.nats),
            "error": _number(gain.error),
            "samples": gain.samples,
            "groups": groups,
        }


def _nats(found: tuple[Rival, Gain]) -> float:
    return found[1].nats


def _is_of_experts(rival: Rival) -> bool:
    """Return whether a rival is made of the mixture's own experts, and is no model by itself."""
    return not rival.facts.keys().isdisjoint(("expert", "experts"))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
