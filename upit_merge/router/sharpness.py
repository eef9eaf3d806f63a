"""Temperature and experts per token, chosen on seed samples that the gates were not fitted to.

Neither is learned by a fit: its targets are the samples' own experts, whereas a mixture's loss also
depends on how far the chosen experts are mixed. Neither needs another fit to be tried, so that a few
sweeps of the mixture over held-out samples decide (no counterpart in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.io.sources import TensorSource
from upit_merge.models.gates import distinct_gates
from upit_merge.router.buckets import Buckets
from upit_merge.router.evaluation import disk_bytes, run_mixture
from upit_merge.router.held_out import OWN, held_out, why_nothing_is_chosen
from upit_merge.router.paired import Gain, paired_gain
from upit_merge.router.progress import Progress
from upit_merge.router.stage import RouterStage

# Temperatures that are tried first; beyond the better of them there is one more.
TEMPERATURES = (0.5, 2.0)
_BEYOND = {0.5: 0.25, 2.0: 4.0}
# Standard errors by which a temperature must be better than 1; and a smaller number of experts,
# whose gates get less of a gradient when the mixture is trained further, none with one.
_ERRORS, _ERRORS_FEWER = 1.0, 2.0


@dataclass(frozen=True)
class Tried:
    """One setting on the held-out samples.

    Attributes:
        perplexity: Over their target tokens.
        gain: Beside the defaults.
    """

    temperature: float
    experts_per_token: int
    perplexity: float
    gain: Gain

    def to_report(self) -> dict[str, Any]:
        """Return plain numbers; what is not known is None."""
        error = self.gain.standard_error
        return {
            "temperature": self.temperature,
            "experts_per_token": self.experts_per_token,
            "perplexity": self.perplexity,
            "gain": self.gain.nats,
            "standard_error": error if math.isfinite(error) else None,
        }


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        temperature, experts_per_token: The choice.
        held_out: Samples that it was made on.
        tried: All that was tried, the defaults first.
        reason: Why nothing was chosen; empty if something was.
        shares: Every expert's share of the routed places on the held-out samples, with the choice,
            mean over the layers, (num_experts,); None without them.
        expert_bytes: What an expert takes on disk, over all layers.
    """

    temperature: float
    experts_per_token: int
    held_out: int = 0
    tried: Sequence[Tried] = ()
    reason: str = ""
    shares: Tensor | None = None
    expert_bytes: int = 0

    def to_report(self) -> dict[str, Any]:
        """Return what the router's report keeps of it."""
        kept: dict[str, Any] = {
            "temperature": self.temperature,
            "experts_per_token": self.experts_per_token,
        }
        if self.reason:
            return {**kept, "reason": self.reason}
        shares = {} if self.shares is None else {"shares": self.shares.tolist()}
        tried = [found.to_report() for found in self.tried]
        kept |= {"held_out": self.held_out, "expert_bytes": self.expert_bytes}
        return {**kept, "tried": tried, **shares}


def fit_and_choose(
    stage: RouterStage, buckets: Buckets, *, free: bool, fixed: str = OWN
) -> tuple[list[Tensor], Chosen]:
    """Fit the gates, and choose what was left open.

    Args:
        free: The number of experts per token was left open.
        fixed: Why it was not, see `why_nothing_is_chosen`.

    Returns:
        The gates, fitted to all samples and scaled by the choice; and the choice.

    Raises:
        UpitError: a loss or a gate is NaN or infinite.
    """
    model, settings = stage.model, stage.settings
    default = model.format.chosen(model.architecture.config)
    reason = why_nothing_is_chosen(settings, model.num_experts, free=free, fixed=fixed)
    held = [] if reason else held_out(buckets, len(stage.everything), stage.seed)
    if not held:
        reason = reason or (
            f"of {len(stage.everything)} samples too few would be left to fit the gates to, or to "
            "choose on"
        )
        gates = distinct_gates(stage.gates(buckets), model.stored_dtype, stage.seed)
        return gates, Chosen(settings.scale, default, reason=reason)
    both = replace(stage, left_out=frozenset(held)).gates(buckets)
    whole, part = ([gate[kind] for gate in both] for kind in range(2))
    part = distinct_gates(part, model.stored_dtype, stage.seed)
    trial = _Trial(stage, part, held, default)
    found = trial.choose(temperature=settings.temperature is None, fewer=free)
    whole = distinct_gates(whole, model.stored_dtype, stage.seed)
    scale = found.temperature / settings.scale  # which the fit has divided by already
    gates = [stage.checked(layer, gate / scale) for layer, gate in enumerate(whole)]
    return gates, found


class _Trial:
    """Runs the mixture over the held-out samples, once for each setting."""

    def __init__(
        self, stage: RouterStage, gates: Sequence[Tensor], held: Sequence[int], default: int
    ) -> None:
        samples = [stage.seeds.samples[index] for index in held]
        seeds = replace(stage.seeds, samples=samples)
        self._stage = replace(stage, seeds=seeds, progress=Progress())
        self._gates, self._default = gates, default
        self._targets = torch.tensor([s.num_targets for s in samples], dtype=torch.float64)
        self._sums: dict[tuple[float, int], Tensor] = {}
        self._shares: dict[tuple[float, int], Tensor] = {}
        self._own = stage.settings.scale

    def choose(self, *, temperature: bool, fewer: bool) -> Chosen:
        """Try what was left open; better by noise alone is not better."""
        stage = self._stage
        warmer = len(TEMPERATURES) + 1 if temperature and self._default > 1 else 0
        settings = 1 + warmer + (self._default - 1 if fewer else 0)
        work = settings * stage.work(stage.everything, mixture=True) / stage.processes.size
        with stage.bar(work, "choosing temperature and experts per token") as bar:
            self._stage = replace(stage, shared=bar)
            found = self._choose(temperature=temperature, fewer=fewer)
            bar.finish()
        return found

    def _choose(self, *, temperature: bool, fewer: bool) -> Chosen:
        best = (self._own, self._default)
        self._measure(*best)
        if temperature and self._default > 1:
            for warmer in TEMPERATURES:
                self._measure(warmer, self._default)
            near = min(TEMPERATURES, key=lambda t: self._loss(t, self._default))
            if self._loss(near, self._default) < self._loss(*best):
                self._measure(_BEYOND[near], self._default)
            candidates = [setting for setting in self._sums if setting != best]
            candidate = min(candidates, key=lambda setting: self._loss(*setting))
            if self._is_better(candidate, best, _ERRORS):
                best = candidate
        if fewer:
            for count in range(self._default - 1, 0, -1):
                # With one expert whose weight is 1 the temperature does not matter.
                candidate = (best[0], count)
                self._measure(*candidate)
                if self._is_better(candidate, best, _ERRORS_FEWER):
                    best = candidate
        first = (self._own, self._default)
        tried = [
            Tried(*setting, math.exp(min(700.0, self._loss(*setting))), self._gain(setting, first))
            for setting in self._sums
        ]
        _whole, of_expert = disk_bytes(self._stage.model)
        return Chosen(*best, len(self._targets), tried, "", self._shares[best], of_expert)

    def _measure(self, temperature: float, count: int) -> None:
        stage = self._stage
        if count != self._default:
            source = _WithChosen(stage.model.moe, stage.model.format.with_chosen, count)
            model = LayerwiseMixture(source, stage.model.device, stage.model.arithmetic)
            stage = replace(stage, model=model)
        gates = [gate / (temperature / self._own) for gate in self._gates]
        sums, routing = run_mixture(stage, gates)
        self._sums[temperature, count] = sums
        members = range(len(self._targets))
        self._shares[temperature, count] = routing.counts(members).shares.mean(0)

    def _loss(self, temperature: float, count: int) -> float:
        return float(self._sums[temperature, count].sum() / self._targets.sum())

    def _gain(self, ours: tuple[float, int], theirs: tuple[float, int]) -> Gain:
        return paired_gain(self._sums[theirs] - self._sums[ours], self._targets)

    def _is_better(self, ours: tuple[float, int], theirs: tuple[float, int], errors: float) -> bool:
        gain = self._gain(ours, theirs)
        return bool(gain.nats > errors * gain.standard_error)


class _WithChosen:
    """A mixture whose configuration says another number of experts per token."""

    def __init__(self, source: TensorSource, change: Any, count: int) -> None:
        self._source = source
        self.config: Mapping[str, Any] = change(source.config, count)

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def specs(self) -> Mapping[str, Any]:
        return self._source.specs

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.rows(name, start, stop)
