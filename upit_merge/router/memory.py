"""How much memory router pre-training takes, from sizes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from upit_merge.config.router import RouterSettings
from upit_merge.engine.arithmetic import Arithmetic
from upit_merge.engine.first_order import BLOCK_ELEMENTS, SLOPE_TOKENS
from upit_merge.engine.layerwise import LOGIT_ROWS, LayerwiseMixture
from upit_merge.models.formats import MixtureFormat, routed_size
from upit_merge.models.mixture import mixture_shapes
from upit_merge.router.control import loss_sweeps
from upit_merge.router.objectives import CHUNK_BYTES

# What the allocator loses, and Python's own objects; see benchmarks/router_memory.py.
_MARGIN = 1.1
_SMALL_THINGS = 64 << 20
# Tokens that a gate is fitted to: of more than twice as many only every second, third … is taken,
# for those of a sample say much the same.
FITTED_TOKENS = 32_768
# A group of samples whose losses are estimated reads all experts: beside the arithmetic of so many
# tokens per expert that takes a fiftieth of the time.
GROUP_TOKENS = 1024
# Room of a group whose losses are estimated, if `memory_gb` allows it.
GROUP_BYTES = 384 << 20


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a mixture, in elements unless said otherwise.

    Attributes:
        hidden_size, intermediate_size, vocab_size, num_layers, num_experts: Of its configuration.
        attention: Attention and norms of a layer.
        itemsize: Bytes of a stored element.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_experts: int
    attention: int
    itemsize: int

    @property
    def projection(self) -> int:
        """One of the three matrices of an FFN."""
        return self.hidden_size * self.intermediate_size

    @property
    def embeddings(self) -> int:
        return self.vocab_size * self.hidden_size


def shape_of(
    form: MixtureFormat, settings: Mapping[str, Any], num_experts: int, dtype: torch.dtype
) -> ModelShape:
    """Return the sizes of a mixture that is there or will be.

    Args:
        settings: Those that its experts share as dense models, see `DenseArchitecture`.
        dtype: In which it is stored.
    """
    # All but the experts of the largest layer: layers may differ.
    backbones: dict[str, int] = defaultdict(int)
    for name, shape in mixture_shapes(form, settings, num_experts=form.fewest_experts):
        if name.startswith("model.layers.") and form.is_backbone(name):
            backbones[name.split(".")[2]] += prod(shape)
    return ModelShape(
        hidden_size=settings["hidden_size"],
        intermediate_size=routed_size(settings),
        vocab_size=settings["vocab_size"],
        num_layers=settings["num_hidden_layers"],
        num_experts=num_experts,
        attention=max(backbones.values()),
        itemsize=dtype.itemsize,
    )


def shape_of_model(model: LayerwiseMixture) -> ModelShape:
    """Return the sizes of an open mixture."""
    dense = model.architecture.dense_settings()
    return shape_of(model.format, dense, model.num_experts, model.stored_dtype)


@dataclass(frozen=True)
class RouterMemory:
    """What the stage takes at its worst moment, in bytes.

    Attributes:
        compute: Weights, activations and matrices, where the arithmetic is done.
        states: Hidden states that are kept in RAM.
        spilled: Hidden states that are kept on the disk.
    """

    compute: int
    states: int
    spilled: int


def router_memory(
    shape: ModelShape,
    lengths: Sequence[int],
    settings: RouterSettings,
    *,
    cpu: bool,
    evaluated: bool = False,
    arithmetic: Arithmetic | None = None,
) -> RouterMemory:
    """Return the peak over the parts of the stage that the settings ask for.

    Args:
        lengths: Tokens of this process's samples.
        cpu: Whether the arithmetic is done on the CPU.
        evaluated: The mixture is only evaluated, nothing is trained.
        arithmetic: Of the sweeps; if not given, on the CPU in float32, else in the stored dtype.
    """
    stored = item = weight = 4 if cpu else shape.itemsize
    if arithmetic is not None:
        item, weight = arithmetic.states.itemsize, arithmetic.products.itemsize
    budget = int(float(settings.memory_gb) * 2**30)
    row = item * shape.hidden_size
    states, on_disk = row * (sum(lengths) + min(sum(lengths), 2 * FITTED_TOKENS)), 0
    parts = [_sweeps(shape, lengths, settings, item, weight), _head(shape, item)]
    if loss_sweeps(settings, shape.num_experts, len(lengths)) < shape.num_experts:
        batch = _batch(lengths, settings)
        group = max(batch, min(sum(lengths), group_tokens(shape, lengths, settings, item, weight)))
        parts.append(_first_order(shape, group, min(batch, SLOPE_TOKENS), item, weight))
        states = max(states, group * _group_states(shape, item))
        on_disk = row * group * shape.num_layers
    if evaluated:
        parts.append(_mixture(shape, lengths, settings, item, weight, 0))
    if settings.refine is not None:
        tokens = max(settings.refine.tokens, *lengths)
        kept = (shape.num_layers + 1) * item + 4
        states = max(states, kept * shape.hidden_size * min(tokens, sum(lengths)))
        # `auto` makes only the sweeps faster.
        refined = stored if settings.compute == "auto" else weight
        parts.append(_mixture(shape, lengths, settings, item, refined, budget))
    if settings.trains_experts:
        parts.append(_training(shape, lengths, settings, stored))
    kept_states = min(states, budget)
    compute = int(_MARGIN * max(parts)) + _SMALL_THINGS
    return RouterMemory(compute, kept_states, states - kept_states + on_disk)


def group_tokens(
    shape: ModelShape, lengths: Sequence[int], settings: RouterSettings, item: int, weight: int
) -> int:
    """Return the tokens of a group whose losses are estimated to first order.

    Every group reads all experts once more; so many that this takes little, if the memory that
    hidden states of all samples would take has room for them.
    """
    states = 2 * item * shape.hidden_size * sum(lengths)
    room = min(int(float(settings.memory_gb) * 2**30), max(states, GROUP_BYTES))
    token = _group_states(shape, item) + _tape(shape, weight)
    return max(1, min(GROUP_TOKENS * shape.num_experts, room // token))


def _group_states(shape: ModelShape, item: int) -> int:
    """What enters a layer, and its slope, float32; of one token."""
    return shape.hidden_size * (item + 4)


def _tape(shape: ModelShape, weight: int) -> int:
    """What a layer's FFN sees of a token, and the slopes of its projections."""
    return weight * (2 * shape.hidden_size + 3 * shape.intermediate_size)


def _first_order(shape: ModelShape, tokens: int, batch: int, item: int, weight: int) -> int:
    """Return two layers, the tape of a group, and a batch with what is kept to differentiate it."""
    layer = (shape.attention + 3 * shape.projection) * weight
    # While an FFN is made from all experts: a sum, a summand, and that as it is stored.
    reading = shape.projection * (8 + shape.itemsize)
    # Differences of all experts in a block, and as they are stored; twice, as one is read ahead.
    block = 2 * BLOCK_ELEMENTS * shape.num_experts * (4 + 2 * shape.itemsize)
    activations = batch * (6 * weight * shape.intermediate_size + 16 * item * shape.hidden_size)
    return 2 * layer + reading + block + tokens * _tape(shape, weight) + activations


def _batch(lengths: Sequence[int], settings: RouterSettings) -> int:
    """Tokens of the largest batch."""
    return min(sum(lengths), max(settings.batch_tokens, *lengths))


def _sweeps(
    shape: ModelShape, lengths: Sequence[int], settings: RouterSettings, item: int, weight: int
) -> int:
    """Return a dense layer, the next one, and a batch; or a covariance and a solver's matrices."""
    layer = (shape.attention + 3 * shape.projection) * weight
    # While the next FFN is made from all experts: a sum, a summand, and that as it is stored.
    reading = shape.projection * (8 + shape.itemsize)
    # The FFN's four activations, and the attention's.
    wide = 4 * shape.intermediate_size + 8 * shape.hidden_size
    activations = _batch(lengths, settings) * item * wide
    chunk = min(CHUNK_BYTES, 4 * shape.hidden_size * sum(lengths))
    fitting = 6 * 8 * shape.hidden_size**2 + 4 * chunk
    return 2 * layer + reading + max(activations, fitting)


def _head(shape: ModelShape, item: int) -> int:
    """Return the output head and the logits of some rows."""
    return shape.embeddings * (item + shape.itemsize) + 3 * 4 * LOGIT_ROWS * shape.vocab_size


def _mixture(
    shape: ModelShape,
    lengths: Sequence[int],
    settings: RouterSettings,
    item: int,
    weight: int,
    budget: int,
) -> int:
    """Three layers with all experts, or all layers if they fit, and a batch with its gradients."""
    layer = (shape.attention + 3 * shape.num_experts * shape.projection) * weight
    whole = layer * shape.num_layers
    # For a moment the layer before is there beside the next one.
    weights = whole if whole <= budget else 3 * layer
    # Four activations of each of two experts, and the attention's, kept for the gradients.
    wide = 8 * shape.intermediate_size + 16 * shape.hidden_size
    activations = _batch(lengths, settings) * item * wide
    return weights + shape.projection * (weight + shape.itemsize) + activations


def _training(
    shape: ModelShape, lengths: Sequence[int], settings: RouterSettings, item: int
) -> int:
    """A whole dense model; gradients and two moments of what is trained; a batch's activations."""
    upit = settings.upit_settings
    ffn = 3 * shape.projection * shape.num_layers
    frozen = shape.attention * shape.num_layers + 2 * shape.embeddings
    if upit.lora_rank is None:
        weights = ffn * 16 + frozen * item
    else:
        width = shape.hidden_size + shape.intermediate_size
        factors = 3 * upit.lora_rank * width * shape.num_layers
        weights = (ffn + frozen) * item + factors * 16
    tokens = upit.batch_size * max(lengths)
    # Of every layer its input is kept; one layer at a time is computed again.
    kept = shape.num_layers * shape.hidden_size
    inner = 10 * shape.intermediate_size + 16 * shape.hidden_size
    return weights + tokens * 4 * (kept + inner) + 4 * 4 * LOGIT_ROWS * shape.vocab_size
