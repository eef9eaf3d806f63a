"""A mixture's own part of an evaluation: what an earlier call has measured is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upit_merge.commands.measured import Measured, keep, kept
from upit_merge.commands.session import RouterSession
from upit_merge.config.router import OF_DATA
from upit_merge.output.identity import file_states
from upit_merge.router.assignment import assigned, sample_losses
from upit_merge.router.evaluation import Routing, run_mixture
from upit_merge.router.pretrain import computed_mixture, refined_gates
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage

# Settings of which nothing is seen but the samples that are left.
_OF_SAMPLES = {*OF_DATA, "sample", "max_length"}
_COUNTS = ("chosen", "first")  # of tokens: whole numbers


@dataclass(frozen=True)
class MixtureMeasurement:
    """What an evaluation needs of a mixture, in parts that are kept by themselves.

    A part is known by the files of the model, the samples' tokens and whatever of the settings it
    depends on; kinds of text (`--group-by`) are told apart later.

    Attributes:
        session: The mixture's.
        held_out: Runs the samples through it.
        control: The stage that made its gates, with shuffled buckets, if they are to be compared.
        before: What earlier calls have measured, by part.
    """

    session: RouterSession
    held_out: RouterStage
    control: RouterStage | None
    before: dict[str, Measured]

    @classmethod
    def of(
        cls, session: RouterSession, held_out: RouterStage, control: RouterStage | None
    ) -> MixtureMeasurement:
        """Look what earlier calls have measured; all processes must call this."""
        measurement = cls(session, held_out, control, {})
        for part in ("mixture", "experts", "control")[: 2 if control is None else 3]:
            found = kept(measurement._identity(part)) if held_out.processes.is_first else None
            if (known := held_out.processes.gather(found)[0]) is not None:
                measurement.before[part] = known
        return measurement

    def mixture(self, label: str) -> tuple[Tensor, Routing]:
        """Return the samples' losses and what the router did, see `run_mixture`.

        Args:
            label: What the progress bar says, if not empty.
        """
        if known := self.before.get("mixture"):
            sums = known.tensors["sums"]
            routing = Routing(0, 0, 0)
            for name in _COUNTS:
                setattr(routing, name, known.tensors[name].double())
            routing.entropy = known.tensors["entropy"]
            return sums, routing
        identity = self._identity("mixture")
        sums, routing = run_mixture(replace(self.held_out, label=label))
        counts = {name: getattr(routing, name).to(torch.int32) for name in _COUNTS}
        self._keep(identity, Measured({"sums": sums, "entropy": routing.entropy, **counts}))
        return sums, routing

    def experts(self) -> SampleLosses:
        """Return every sample's loss under every expert, see `sample_losses`."""
        if known := self.before.get("experts"):
            control = None
            if "control_sums" in known.tensors:
                exact = known.tensors["control_sums"], known.tensors["control_counts"]
                control = SampleLosses(*exact, known.facts["control_told"])
            sums, counts = known.tensors["sums"], known.tensors["counts"]
            return SampleLosses(sums, counts, known.facts["told"], control)
        identity = self._identity("experts")
        losses = sample_losses(self.held_out)
        tensors = {"sums": losses.sums, "counts": losses.counts}
        facts: dict[str, Any] = {"told": dict(losses.told)}
        if losses.control is not None:
            tensors["control_sums"] = losses.control.sums
            tensors["control_counts"] = losses.control.counts
            facts["control_told"] = dict(losses.control.told)
        self._keep(identity, Measured(tensors, facts))
        return losses

    def shuffled(self) -> Tensor:
        """Return the samples' losses with the control's gates, float64, (num_samples,)."""
        if known := self.before.get("control"):
            return known.tensors["sums"]
        control = self.control
        assert control is not None
        identity = self._identity("control")
        gates: Sequence[Tensor] = control.gates(assigned(control))
        if control.settings.refine is not None:
            device, settings = control.model.device, control.settings
            exact = computed_mixture(self.session.moe, device, settings)
            gates, _ = refined_gates(control, gates, exact)
        sums = run_mixture(self.held_out, gates)[0]
        self._keep(identity, Measured({"sums": sums}))
        return sums

    def told(self, parts: Sequence[str]) -> Iterator[str]:
        """Yield a sentence on what earlier calls have measured of the parts that are needed."""
        names = {
            "mixture": "the mixture",
            "experts": "its single experts",
            "control": "the shuffled router",
        }
        known = [part for part in parts if part in self.before]
        if known == list(parts):
            yield "This mixture was measured on these samples before: nothing of it was computed."
        elif known:
            named = " and ".join(names[part] for part in known)
            yield f"Measured on these samples before, and not computed again: {named}."

    def _keep(self, identity: dict[str, Any], measured: Measured) -> None:
        if self.held_out.processes.is_first:
            keep(identity, measured)

    def _identity(self, part: str) -> dict[str, Any]:
        identity = {
            "part": part,
            "files": file_states(self.session.moe.files(), ""),
            "held-out": _described(self.held_out),
        }
        if part == "control":
            assert self.control is not None
            identity["control"] = _described(self.control)
        return identity


def _described(stage: RouterStage) -> dict[str, Any]:
    """Return what decides the numbers of a stage, besides the model."""
    samples = [(sample.input_ids, sample.loss_start) for sample in stage.seeds.samples]
    return {
        "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        "settings": stage.settings.model_dump(mode="json", exclude=_OF_SAMPLES),
        "seed": stage.seed,
        "compute": [stage.model.arithmetic.identity(), stage.model.device.type],
    }
