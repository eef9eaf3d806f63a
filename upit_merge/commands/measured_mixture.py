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
from upit_merge.commands.measured_files import ModelFiles
from upit_merge.commands.rivals import Rivals, Sources, measured_rivals
from upit_merge.commands.session import RouterSession
from upit_merge.config.router import OF_DATA
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
        files: What its files were before it was opened.
        held_out: Runs the samples through it.
        control: The stage that made its gates, with shuffled buckets, if they are to be compared.
        sources: What it was made from.
        before: What earlier calls have measured, by part.
    """

    session: RouterSession
    files: ModelFiles
    held_out: RouterStage
    control: RouterStage | None
    sources: Sources
    before: dict[str, Measured]

    @classmethod
    def of(
        cls,
        session: RouterSession,
        files: ModelFiles,
        held_out: RouterStage,
        control: RouterStage | None,
        sources: Sources,
        parts: Sequence[str],
    ) -> MixtureMeasurement:
        """Look what earlier calls have measured of some parts; all processes must call this."""
        measurement = cls(session, files, held_out, control, sources, {})
        for part in parts:
            found = measurement._kept(part) if held_out.processes.is_first else None
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
        sums, routing = run_mixture(replace(self.held_out, label=label))
        counts = {name: getattr(routing, name).to(torch.int32) for name in _COUNTS}
        self._keep("mixture", Measured({"sums": sums, "entropy": routing.entropy, **counts}))
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
        losses = sample_losses(self.held_out)
        tensors = {"sums": losses.sums, "counts": losses.counts}
        facts: dict[str, Any] = {"told": dict(losses.told)}
        if losses.control is not None:
            tensors["control_sums"] = losses.control.sums
            tensors["control_counts"] = losses.control.counts
            facts["control_told"] = dict(losses.control.told)
        self._keep("experts", Measured(tensors, facts))
        return losses

    def shuffled(self) -> Tensor:
        """Return the samples' losses with the control's gates, float64, (num_samples,)."""
        if known := self.before.get("control"):
            return known.tensors["sums"]
        control = self.control
        assert control is not None
        gates: Sequence[Tensor] = control.gates(assigned(control))
        if control.settings.refine is not None:
            device, settings = control.model.device, control.settings
            exact = computed_mixture(self.session.moe, device, settings)
            gates, _ = refined_gates(control, gates, exact)
        sums = run_mixture(self.held_out, gates)[0]
        self._keep("control", Measured({"sums": sums}))
        return sums

    def rivals(self, part: str, losses: SampleLosses | None, label: str) -> Rivals:
        """Return the models beside it, see `measured_rivals`.

        Args:
            part: `rivals`, or `blends` without single models.
            losses: Of the samples under the experts; None without single models.
            label: What the progress bars say, if not empty.
        """
        if known := self.before.get(part):
            return Rivals.of_kept(known.tensors, known.facts)
        stage = replace(self.held_out, label=label)
        found = measured_rivals(self.session, stage, self.sources, losses)
        self._keep(part, Measured(*found.to_kept()))
        return found

    def told(self, parts: Sequence[str]) -> Iterator[str]:
        """Yield a sentence on what earlier calls have measured of the parts that are needed."""
        names = {
            "mixture": "the mixture",
            "experts": "its single experts",
            "control": "the shuffled router",
            "rivals": "the models beside it",
            "blends": "the models beside it",
        }
        known = [part for part in parts if part in self.before]
        if known == list(parts):
            yield "This mixture was measured on these samples before: nothing of it was computed."
        elif known:
            *others, last = (names[part] for part in known)
            named = " and ".join([", ".join(others), last] if others else [last])
            yield f"Measured on these samples before, and not computed again: {named}."

    def _kept(self, part: str) -> Measured | None:
        identity = self._identity(part)
        found = None if identity is None else kept(identity)
        return found if found is not None and self._fits(part, found) else None

    def _keep(self, part: str, measured: Measured) -> None:
        # Looked at once more: the files may have been written while they were read.
        if self.held_out.processes.is_first and (identity := self._identity(part)) is not None:
            keep(identity, measured)

    def _fits(self, part: str, found: Measured) -> bool:
        """Return whether these are numbers of this model's size, on so many samples."""
        model, samples = self.held_out.model, len(self.held_out.everything)
        routed = [samples, len(model.mixture_layers)]
        wanted: dict[str, tuple[torch.dtype, list[int]]] = {"sums": (torch.float64, [samples])}
        if part in ("rivals", "blends"):
            models = found.facts.get("models")
            count = len(models) if isinstance(models, list) else 0
            wanted = {f"rival-{i}": (torch.float64, [samples]) for i in range(count)}
        elif part == "mixture":
            wanted["entropy"] = torch.float64, routed
            wanted |= {name: (torch.int32, [*routed, model.num_experts]) for name in _COUNTS}
        elif part == "experts":
            wanted = _losses("", samples, model.num_experts)
            if "control_sums" in found.tensors:
                controlled = found.tensors["control_sums"].shape[:1].numel()
                wanted |= _losses("control_", controlled, model.num_experts)
            told = [name.replace("sums", "told") for name in wanted if name.endswith("sums")]
            if not all(isinstance(found.facts.get(name), dict) for name in told):
                return False
        return wanted == {n: (t.dtype, list(t.shape)) for n, t in found.tensors.items()}

    def _identity(self, part: str) -> dict[str, Any] | None:
        """Return what a part is known by; None if it is no longer what was opened."""
        own = self.session.moe.files()
        if part in ("rivals", "blends"):
            own = [*own, *self.sources.files()]
        if (files := self.files.identity(own)) is None:
            return None
        identity = {
            "part": part,
            "files": files,
            "held-out": _described(self.held_out),
        }
        if part in ("rivals", "blends"):
            identity["sources"] = self.sources.reason
        if part == "control":
            assert self.control is not None
            identity["control"] = _described(self.control)
        return identity


def _losses(name: str, samples: int, experts: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return what `SampleLosses` of so many samples are made of."""
    return {
        f"{name}sums": (torch.float64, [samples, experts, 2]),
        f"{name}counts": (torch.float64, [samples, 2]),
    }


def _described(stage: RouterStage) -> dict[str, Any]:
    """Return what decides the numbers of a stage, besides the model."""
    samples = [(sample.input_ids, sample.loss_start) for sample in stage.seeds.samples]
    return {
        "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        "settings": stage.settings.model_dump(mode="json", exclude=_OF_SAMPLES),
        "seed": stage.seed,
        "compute": [stage.model.arithmetic.identity(), stage.model.device.type],
    }
