"""Losses, buckets and gates: the parts of router pre-training that run the layers one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine.hidden_states import (
    MEAN,
    LayersOnDisk,
    PackedStates,
    Stream,
    token_batches,
)
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.io.disk import free_bytes
from upit_merge.io.tensor_file import all_finite
from upit_merge.router.buckets import Buckets
from upit_merge.router.chosen_objective import objective_of
from upit_merge.router.control import Pair, PairLosses
from upit_merge.router.effort import Effort, fitted_every
from upit_merge.router.objectives import GateData, Objective
from upit_merge.router.progress import Progress
from upit_merge.router.router_gain import SampleLosses
from upit_merge.runtime.clock import Clock
from upit_merge.runtime.processes import ALONE, Processes
from upit_merge.runtime.work_bar import WorkBar


@dataclass(frozen=True)
class RouterStage:
    """Fits the gates of a MoE folder to seed data, layer by layer; writes nothing to it.

    First every sample's loss under every expert (as a dense model) sorts the samples into
    buckets. Then the samples run through the layers once more, and at every layer the gate is
    fitted to tell the buckets apart by what the gate sees there.

    Args:
        model: The MoE folder.
        seeds: From `load_seed_set`.
        settings: The recipe's `router:` block.
        seed: Of whatever is random.
        scratch: A folder of this process for hidden states that exceed the memory budget.
        processes: Share the samples; all of them must call the same methods.
        progress: What a killed run has done already.
        quiet: No progress bars.
        clock: Measures the parts of the stage.
        label: What progress bars say instead of what is computed.
        shared: One bar for all that is computed, which knows of all of it; instead of several.
        left_out: Samples a second gate is not fitted to: `gates` gives (2, num_experts, hidden_size).
    """

    model: LayerwiseMixture
    seeds: SeedSet
    settings: RouterSettings
    seed: int
    scratch: Path
    processes: Processes = ALONE
    progress: Progress = field(default_factory=Progress)
    quiet: bool = False
    clock: Clock = field(default_factory=Clock)
    kept_inputs: list[LayersOnDisk] = field(default_factory=list)
    label: str = ""
    shared: WorkBar | None = None
    left_out: frozenset[int] = frozenset()

    @property
    def _twice(self) -> str:
        return "-twice" * bool(self.left_out)  # of names: what is kept has another shape

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.seeds.samples]

    @property
    def everything(self) -> range:
        return range(len(self.seeds.samples))

    def stream(self, expert: int, samples: Sequence[int]) -> Stream:
        """This process's share of samples that go through an expert."""
        batches = tuple(token_batches(samples, self.lengths, self.settings.batch_tokens))
        return Stream(expert, batches).share(self.processes)

    def lengths_of(self, streams: Sequence[Stream]) -> list[int]:
        """Return the tokens of every sample, 0 for those that are in none of the streams."""
        mine = {index for stream in streams for index in stream.samples}
        return [length if i in mine else 0 for i, length in enumerate(self.lengths)]

    @contextlib.contextmanager
    def states(self, streams: Sequence[Stream], *, every: int = 1) -> Iterator[PackedStates]:
        """Room for the hidden states of some streams; there may be two of them at a time.

        Args:
            every: One token of so many is kept.
        """
        with contextlib.closing(
            PackedStates(
                self.lengths_of(streams),
                self.model.hidden_size,
                self.model.dtype,
                scratch=self.scratch,
                budget_bytes=float(self.settings.memory_gb) * 2**30 / 2,
                every=every,
            )
        ) as states:
            yield states

    def bar(
        self, work: float, description: str, *, units: int | None = None, unit: str = "sample"
    ) -> contextlib.AbstractContextManager[WorkBar]:
        """Open a progress bar, of the first process.

        Args:
            work: This process's, in whatever measure the bar is told of what is done.
            units: What users see; if not given, all samples.
        """
        if self.shared is not None:
            return contextlib.nullcontext(self.shared)
        shown = len(self.everything) if units is None else units
        quiet = self.quiet or not self.processes.is_first
        return WorkBar(shown, work, self.label or description, quiet=quiet, unit=unit)

    @cached_property
    def effort(self) -> Effort:
        """What the parts of the stage cost, in tokens through a dense layer."""
        return Effort.of_model(self.model, self.settings, sum(self.lengths))

    def work(
        self, indices: Sequence[int], *, mixture: bool = False, with_losses: bool = True
    ) -> float:
        """Return the work of a sweep of some samples, as `bar` takes it: in tokens through a layer.

        Args:
            mixture: It goes through the mixture instead of a dense model.
            with_losses: The losses are computed as well.
        """
        tokens = sum(self.lengths[index] for index in indices)
        layers = tokens * self.model.num_layers * (self.effort.mixture if mixture else 1)
        return layers + self.effort.head * self.targets(indices) * with_losses

    def targets(self, indices: Iterable[int]) -> int:
        """Return how many tokens of some samples count in a loss."""
        return sum(self.seeds.samples[index].num_targets for index in indices)

    # ---- losses ----------------------------------------------------------------------------

    def exact_losses(self, pairs: Sequence[Pair], name: str, *, finite: bool = True) -> PairLosses:
        """Return the exact losses of some samples under some experts.

        Args:
            pairs: A sample and an expert each.
            name: Under which they are kept.
            finite: Refuse losses that are not.

        Raises:
            UpitError: a loss is NaN or infinite.
        """
        samples = [self.seeds.samples[sample] for sample, _ in pairs]
        counts = torch.tensor([sample.halves for sample in samples], dtype=torch.float64)
        if kept := self.progress.kept(name):
            return PairLosses(pairs, kept[0]["sums"], counts)
        part = replace(self, seeds=replace(self.seeds, samples=samples))
        streams = [
            part.stream(expert, [i for i, (_, other) in enumerate(pairs) if other == expert])
            for expert in range(self.model.num_experts)
        ]
        mine = [index for stream in streams for index in stream.samples]
        tokens = sum(part.lengths[index] for index in mine)
        with (
            self.clock.measure("losses"),
            part.states(streams) as states,
            part.bar(part.work(mine), "exact losses of some") as bar,
        ):
            layer, _results = self.progress.states(name, states)
            bar.skip(tokens * layer)
            self.model.sweep(
                samples,
                streams,
                states,
                first_layer=layer,
                after_layer=partial(self._after_layer, name, states, ()),
                on_progress=bar.advance,
            )
            sums = self.processes.total(
                self.model.losses(samples, states, on_progress=bar.part(self.effort.head))
            )
        if finite:
            for (_, expert), loss in zip(pairs, sums, strict=True):
                _check_finite(expert, loss)
        self.progress.keep(name, {"sums": sums})
        self.progress.drop_states()
        return PairLosses(pairs, sums, counts)

    def losses(self) -> SampleLosses:
        """Return every sample's exact loss under every expert, one sweep for each.

        Raises:
            UpitError: a loss is NaN or infinite.
        """
        stream = self.stream(0, self.everything)
        tokens = sum(self.lengths[index] for index in stream.samples)
        head, per_sweep = self.effort.head, self.work(stream.samples)
        found: list[Tensor] = []
        # One expert at a time: hidden states of one stream, at the price of reading the attention
        # weights once per expert, a fifth more than reading everything once.
        with (
            self.clock.measure("losses"),
            self.states([stream]) as states,
            self.bar(per_sweep * self.model.num_experts, "losses of the experts") as bar,
        ):
            for expert in range(self.model.num_experts):
                name = f"losses-{expert}"
                if kept := self.progress.kept(name):
                    found.append(kept[0]["sums"])
                    bar.skip(per_sweep)
                    continue
                layer, _gates = self.progress.states(name, states)
                bar.skip(tokens * layer)
                self.model.sweep(
                    self.seeds.samples,
                    [Stream(expert, stream.batches)],
                    states,
                    first_layer=layer,
                    after_layer=partial(self._after_layer, name, states, ()),
                    on_progress=bar.advance,
                )
                sums = self.processes.total(
                    self.model.losses(self.seeds.samples, states, on_progress=bar.part(head))
                )
                _check_finite(expert, sums)
                found.append(sums)
                self.progress.keep(name, {"sums": sums})
                self.progress.drop_states()
        return SampleLosses.of(self.seeds.samples, found)

    def _after_layer(
        self, name: str, states: PackedStates, gates: Sequence[Tensor], layer: int
    ) -> None:
        if layer + 1 < self.model.num_layers:
            self.progress.keep_states(name, layer + 1, states, gates)

    def open_gate_inputs(self) -> LayersOnDisk | None:
        """Make room for what the gates see of the experts' mean, if it will be needed and fits."""
        settings, model = self.settings, self.model
        if settings.router_stream != "mean" or settings.trains_experts:
            return None
        kept = LayersOnDisk(
            self.lengths_of([self.stream(MEAN, self.everything)]),
            model.hidden_size,
            model.dtype,
            every=self.fitted_every,
            num_layers=model.num_layers,
            folder=self.scratch,
            name="gate-inputs",
        )
        if 2 * kept.num_bytes * model.num_layers > free_bytes(self.scratch):
            kept.close()
            return None
        self.kept_inputs.append(kept)
        return kept

    @property
    def fitted_every(self) -> int:
        """Of how many tokens one is enough for a gate to be fitted to."""
        return fitted_every(sum(self.lengths))

    # ---- gates -----------------------------------------------------------------------------

    def gates(self, buckets: Buckets, objective: Objective | None = None) -> list[Tensor]:
        """Run the samples through their experts and fit every mixture's gate on the way.

        Args:
            objective: Instead of the settings', whose result is then scaled by the temperature.

        Raises:
            UpitError: a gate is NaN or infinite.
        """
        if fitted := self.progress.kept_layers(f"fitted{self._twice}"):
            return fitted
        if self.settings.router_stream == "mean":
            streams = [self.stream(MEAN, self.everything)]
        else:
            streams = [
                self.stream(e, (buckets.assigned == e).nonzero().flatten().tolist())
                for e in range(self.model.num_experts)
            ]
        fit = objective or objective_of(self.settings, self.seed)
        tokens = sum(self.lengths[index] for stream in streams for index in stream.samples)
        kept = next((kept for kept in self.kept_inputs if kept.complete), None)
        if all(self.processes.gather(kept is not None)) and streams[0].expert == MEAN:
            assert kept is not None
            return self._fitted(kept, streams, fit, buckets)
        per_layer = tokens * (1 + self.effort.fit)
        with (
            self.clock.measure("gates"),
            self.states(streams) as states,
            self.states(streams, every=self.fitted_every) as inputs,
            self.bar(per_layer * self.model.num_layers, "fitting the gates") as bar,
        ):
            first, gates = self.progress.states(f"gates{self._twice}", states, with_results=True)
            bar.skip(per_layer * first)

            def after_layer(layer: int) -> None:
                if layer in self.model.mixture_layers:
                    with self.clock.measure("fitting"):
                        gates.append(self._fit(layer, fit, inputs, buckets))
                else:  # which has no gate; what is kept has one for each layer
                    gates.append(torch.zeros(0))
                bar.advance(tokens * self.effort.fit)
                self._after_layer(f"gates{self._twice}", states, gates, layer)

            self.model.sweep(
                self.seeds.samples,
                streams,
                states,
                router_inputs=inputs,
                first_layer=first,
                after_layer=after_layer,
                on_progress=bar.advance,
            )
        gates = [gates[layer] for layer in self.model.mixture_layers]
        self.progress.keep_layers(f"fitted{self._twice}", gates)
        self.progress.drop_states()
        return gates

    def _fitted(
        self, kept: LayersOnDisk, streams: Sequence[Stream], fit: Objective, buckets: Buckets
    ) -> list[Tensor]:
        """Fit the gates to what a sweep has kept of their inputs."""
        layers = self.model.mixture_layers
        gates: list[Tensor] = []
        with (
            self.clock.measure("gates"),
            self.clock.measure("fitting"),
            contextlib.closing(kept),
            self.states(streams, every=self.fitted_every) as inputs,
            self.bar(len(layers), "fitting the gates", units=len(layers), unit="layer") as bar,
        ):
            for layer in layers:
                kept.read(layer, inputs)
                gates.append(self._fit(layer, fit, inputs, buckets))
                bar.advance(1)
        self.progress.keep_layers(f"fitted{self._twice}", gates)
        return gates

    def _fit(self, layer: int, fit: Objective, inputs: PackedStates, buckets: Buckets) -> Tensor:
        broken = torch.tensor(float(not all_finite(inputs.rows)))
        if float(self.processes.total(broken)):
            raise UpitError(
                f"What the gate of layer {layer} sees is NaN or infinite; a checkpoint is broken, "
                "or its values overflow: use dtype: bfloat16."
            )
        data = GateData(
            inputs.rows,
            [inputs.span(index) for index in self.everything],
            [-(-length // self.fitted_every) for length in self.lengths],
            buckets.assigned,
            self.model.num_experts,
            self.model.device,
            self.model.mixture_layers.index(layer),
            self.processes.total,
        )
        fitted_to = [data, data.without(self.left_out)] if self.left_out else [data]
        gates = torch.stack([self.checked(layer, fit(part)) for part in fitted_to])
        return gates if self.left_out else gates[0]

    def checked(self, layer: int, gate: Tensor) -> Tensor:
        """Return the gate itself.

        Raises:
            UpitError: as it is stored, it is NaN or infinite.
        """
        if not gate.to(self.model.stored_dtype).isfinite().all():
            raise UpitError(
                f"The gate of layer {layer} is NaN or infinite; use a temperature nearer to 1, or "
                "dtype: bfloat16."
            )
        return gate


def _check_finite(expert: int, losses: Tensor) -> None:
    if not losses.isfinite().all():
        raise UpitError(
            f"Expert {expert} gives NaN or infinite losses on the seed data; its checkpoint is "
            "broken, or its values overflow: use dtype: bfloat16."
        )
