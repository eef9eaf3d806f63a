"""What the router's stage will take, said before it starts: from a layer timed on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from upit_merge.commands.preview import PlannedMixture
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet, TokenizedSample
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.merge.inputs import Inputs
from upit_merge.router.effort import (
    Effort,
    LayerTime,
    StageSweeps,
    foretold_seconds,
    stage_sweeps,
    time_layer,
    told_duration,
)
from upit_merge.router.held_out import MOST, why_nothing_is_chosen
from upit_merge.router.memory import shape_of
from upit_merge.router.pretrain import computed_mixture
from upit_merge.router.stage import RouterStage

NO_ROUTER = (
    "Router: none, as the recipe has no router: block. The gates will be training-free random "
    "directions, which do not tell the experts apart; to train them add `router: {data: "
    "seed.jsonl}`, or run `upit-merge router` on the output later."
)

# Seconds of a stage that is called slow.
_SLOW = 600.0
# A run says nothing of a stage of fewer operations than this: some seconds anywhere.
_WORTH_TELLING = 1e13


def planned_router_time(
    inputs: Inputs, seeds: SeedSet, settings: RouterSettings, device: torch.device
) -> Iterator[str]:
    """Yield sentences on the time the stage will take, for a mixture that is not made yet.

    Times a layer of it, unless nothing is to be computed.
    """
    lengths = [len(sample.input_ids) for sample in seeds.samples]
    sweeps = stage_sweeps(settings, inputs.num_experts, lengths)
    if sweeps.total == 0:
        yield "Router: no time; nothing is fitted."
        return
    architecture = inputs.architecture
    shape = shape_of(architecture.format, architecture.settings, inputs.num_experts, inputs.dtype)
    model = computed_mixture(PlannedMixture(inputs), device, settings, quick=has_fast_bfloat16())
    timed = time_layer(model, seeds.samples, settings.batch_tokens)
    # Of the planned model only the checkpoints are there to take a mean of.
    mean = timed.read_mean * inputs.num_experts / model.num_experts
    timed = LayerTime(timed.token, timed.read, mean)
    effort = Effort.of(shape, inputs.experts_per_token, settings, sum(lengths))
    yield from _sentences(timed, effort, sweeps, seeds.samples, architecture.num_layers)
    is_open = inputs.recipe.parameters.experts_per_token is None
    if why_nothing_is_chosen(settings, inputs.num_experts, free=is_open) is None:
        both = settings.temperature is None and is_open and inputs.experts_per_token > 1
        what = "temperature" if settings.temperature is None else "experts per token"
        yield (
            f"Of the samples a quarter is held out, at most {MOST}, to choose "
            f"{'temperature and experts per token' if both else what} on, if enough are left."
        )


def tell_router_time(stage: RouterStage) -> None:
    """Print how long a stage that is about to begin will take, where that is worth a line."""
    if stage.quiet or not stage.processes.is_first:
        return
    model, samples = stage.model, stage.seeds.samples
    sweeps = stage_sweeps(stage.settings, model.num_experts, stage.lengths)
    weights = sum(spec.numel for name, spec in model.moe.specs.items() if ".layers.0." in name)
    operations = 2.0 * sweeps.total * sum(stage.lengths) * weights / model.num_experts
    if operations * model.num_layers < _WORTH_TELLING:
        return
    timed = time_layer(model, samples, stage.settings.batch_tokens)
    mine = samples[:: stage.processes.size]
    for sentence in _sentences(
        timed, stage.effort, sweeps, mine, model.num_layers, stage.processes.size
    ):
        print(sentence, flush=True)


def _sentences(
    timed: LayerTime,
    effort: Effort,
    sweeps: StageSweeps,
    samples: Sequence[TokenizedSample],
    num_layers: int,
    num_processes: int = 1,
) -> Iterator[str]:
    seconds = foretold_seconds(timed, effort, sweeps, samples, num_layers)
    counted = f"{len(samples) * num_processes:,} samples, {sweeps.total:.3g} sweep{'s' * (sweeps.total != 1)}"
    shared = f", {num_processes} processes" if num_processes > 1 else ""
    yield f"Router: about {told_duration(seconds)} on this machine ({counted}{shared})."
    if seconds > _SLOW and sweeps.losses:
        without = replace(sweeps, losses=0.0, gates=float(sweeps.fits))
        rest = foretold_seconds(timed, effort, without, samples, num_layers)
        yield (
            f"All but about {told_duration(rest)} of it are the losses of the samples under the "
            "experts, which are not needed where the data knows its domains: assign: {column: "
            "NAME}. Fewer samples (sample:) or shorter ones (max_length:) take less, too."
        )
