"""How much the parts of router pre-training have to compute, and how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.hidden_states import MEAN, Batch, token_batches
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.router.control import loss_sweeps
from upit_merge.router.held_out import choosing_sweeps
from upit_merge.router.memory import FITTED_TOKENS, ModelShape, shape_of_model

# Fits, in multiplications of a layer's products, as measured with hidden sizes of 128 to 576. A
# step of L-BFGS goes through the inputs twice, which takes longer than what is computed with them.
_FIT_STEPS = 15
_FIT_READING = 50  # per hidden unit of a token
_FIT_SUMS = 90  # sums per class, and the scale of the gate, whatever the objective
_KMEANS_ROUNDS = 20
_FIT_SOLVING = 11  # per cubed hidden unit: factorisations in float64
# A layer is timed on about so many tokens: more would not be faster, per token.
_TIMED_TOKENS = 2048
_TIMED_RUNS = 3


@dataclass(frozen=True)
class Effort:
    """Costs in units of one token through one layer of a dense model, forwards.

    Attributes:
        head: Of a target token's logits and loss.
        fit: Of a token when the gate of a layer is fitted.
        mixture: Of a token through a layer of the mixture.
    """

    head: float
    fit: float
    mixture: float

    @classmethod
    def of(
        cls, shape: ModelShape, experts_per_token: int, settings: RouterSettings, num_tokens: int
    ) -> Effort:
        """Count multiplications.

        Args:
            shape: The mixture's sizes.
            settings: How gates are fitted.
            num_tokens: To how many tokens.
        """
        width, layer = shape.hidden_size, shape.attention + 3 * shape.projection
        fit: float = _FIT_SUMS * width
        if settings.objective in ("one_vs_rest", "softmax", "ridge"):
            # Half of the covariance is computed.
            fit += width**2 / 2 + _FIT_SOLVING * width**3 * fitted_every(num_tokens) / max(
                num_tokens, 1
            )
        if settings.objective in ("one_vs_rest", "softmax"):
            fit += _FIT_STEPS * (_FIT_READING + 2 * shape.num_experts) * width
        if settings.objective == "kmeans":
            rounds = _KMEANS_ROUNDS + shape.num_experts
            fit += rounds * (_FIT_READING + 2 * shape.num_experts) * width
        if settings.objective == "upit":
            fit += settings.upit_settings.epochs * _FIT_READING * width
        fit /= fitted_every(num_tokens)
        routed = shape.attention + 3 * experts_per_token * shape.projection
        routed += shape.num_experts * width
        return cls(head=shape.embeddings / layer, fit=fit / layer, mixture=routed / layer)

    @classmethod
    def of_model(cls, model: LayerwiseMixture, settings: RouterSettings, num_tokens: int) -> Effort:
        """Count those of a mixture."""
        chosen = model.format.chosen(model.architecture.config)
        return cls.of(shape_of_model(model), chosen, settings, num_tokens)


def fitted_every(num_tokens: int) -> int:
    """Return of how many tokens one is enough for a gate to be fitted to."""
    return max(1, num_tokens // FITTED_TOKENS)


@dataclass(frozen=True)
class StageSweeps:
    """How often a stage goes through all its samples.

    Attributes:
        losses: For the losses of the experts.
        gates: For the inputs of the gates.
        tuning: Of a training of the experts, counted in forward sweeps.
        refining: Of a refinement, or the choice of temperature and experts per token, counted in
            forward sweeps of the mixture.
        fits: Whether gates are fitted to what a sweep has shown.
    """

    losses: float
    gates: float
    tuning: float = 0.0
    refining: float = 0.0
    fits: bool = True

    @property
    def total(self) -> float:
        return self.losses + self.gates + self.tuning + self.refining


def stage_sweeps(settings: RouterSettings, num_experts: int, lengths: Sequence[int]) -> StageSweeps:
    """Return how often the stage will go through its samples.

    Where losses to first order turn out not to hold, more are needed, which is known only then.

    Args:
        lengths: Tokens of all samples.
    """
    fits = True
    alone = num_experts == 1 and not settings.trains_experts
    if settings.objective == "random" or alone:
        losses, gates, fits = 0.0, 0.0, False
    else:
        named = settings.names_experts or settings.assign == "shuffled"
        losses = (
            0.0
            if named or not settings.needs_buckets
            else loss_sweeps(settings, num_experts, len(lengths))
        )
        # What the gates see is kept on the way of losses to first order.
        seen = settings.router_stream == "mean" and 0 < losses < num_experts
        gates = 0.0 if settings.trains_experts or seen else 1.0
    # Forwards, once more for the gradients, and those of weights and inputs: twice as much.
    tuning = 4.0 * settings.upit_settings.epochs if settings.trains_experts else 0.0
    refining = choosing_sweeps(settings, num_experts, len(lengths))
    if settings.refine is not None and num_experts > 1:
        # Forwards, once more, and gradients of the inputs.
        tokens = settings.refine.steps * min(settings.refine.tokens, sum(lengths))
        refining = 3.0 * tokens / max(sum(lengths), 1)
    return StageSweeps(losses, gates, tuning, refining, fits and not settings.trains_experts)


@dataclass(frozen=True)
class LayerTime:
    """What one layer takes on this machine.

    Attributes:
        token: Seconds per token, computed in a batch.
        read: Seconds until its weights are there, with the FFN of one expert.
        read_mean: The same, with the mean of all experts.
    """

    token: float
    read: float
    read_mean: float


@torch.no_grad()
def time_layer(
    model: LayerwiseMixture, samples: Sequence[TokenizedSample], batch_tokens: int
) -> LayerTime:
    """Time the first mixture on a batch of the samples, of middle length.

    Args:
        batch_tokens: As in the settings.
    """
    started = time.perf_counter()
    layer = model.mixture_layers[0]
    backbone, ffn = model.backbone(layer), model.ffn(layer, 0)
    read = time.perf_counter() - started
    model.ffn(layer, MEAN)
    mean = time.perf_counter() - started - read
    module = model.dense_layer(layer, backbone)
    model.set_ffn(module, ffn)
    batch = middle_batch([len(sample.input_ids) for sample in samples], batch_tokens)
    longest = max(len(samples[index].input_ids) for index in batch)
    states = torch.randn(
        len(batch),
        longest,
        model.hidden_size,
        generator=torch.Generator().manual_seed(0),
    ).to(model.device, model.dtype)
    seconds = []
    for _ in range(1 + _TIMED_RUNS):
        started = time.perf_counter()
        # With all that is done around it: states go to the device and come back.
        model.layer_output(module, layer, states).cpu()
        seconds.append(time.perf_counter() - started)
    tokens = sum(len(samples[index].input_ids) for index in batch)
    return LayerTime(median(seconds[1:]) / tokens, read, mean)


def middle_batch(lengths: Sequence[int], batch_tokens: int) -> Batch:
    """Return the batch in whose middle half of the tokens are in shorter samples."""
    batches = token_batches(range(len(lengths)), lengths, min(batch_tokens, _TIMED_TOKENS))
    half, seen = sum(lengths) / 2, 0
    for batch in batches:
        seen += sum(lengths[index] for index in batch)
        if seen >= half:
            break
    return batch


def foretold_seconds(
    timed: LayerTime,
    effort: Effort,
    sweeps: StageSweeps,
    samples: Sequence[TokenizedSample],
    num_layers: int,
) -> float:
    """Return about how long the stage will take.

    Args:
        samples: Those of this process.
    """
    tokens = sum(len(sample.input_ids) for sample in samples)
    targets = sum(sample.num_targets for sample in samples)
    through, head = tokens * num_layers, targets * effort.head
    work = sweeps.losses * (through + head)
    work += through * (sweeps.gates + effort.fit * sweeps.fits)
    work += sweeps.tuning * (through + head)
    work += sweeps.refining * (through * effort.mixture + head)
    # Weights are read beside the arithmetic, but by cores that would compute otherwise.
    reading = num_layers * (sweeps.losses * timed.read + sweeps.gates * timed.read_mean)
    return work * timed.token + reading


def told_duration(seconds: float) -> str:
    """Return a duration for people: `40 s`, `12 min`, `3.5 h`, `8 days`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
