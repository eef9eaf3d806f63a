"""How large the blocks are in which models are compared and merged, and the memory they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from upit_merge.merge.inputs import Inputs
from upit_merge.models.lora.adapter import Adapter
from upit_merge.models.views import stored_model
from upit_merge.runtime.device import merge_workers

# Sums are taken block by block, so this size must not depend on the machine.
SUM_BLOCK_ELEMENTS = 1 << 18

# Large enough that Python's part does not show; a GPU wants more work at a time. Results do not
# depend on it.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}

# Of children on a CPU: a dozen passes over a block for each, which run in the processor's cache.
_CHILD_ELEMENTS = 1 << 17


def gram_block_elements(num_checkpoints: int) -> int:
    """Return the elements of a block in pass 1: fewer with more checkpoints, for equal memory."""
    return max(1 << 12, min(SUM_BLOCK_ELEMENTS, 8 * SUM_BLOCK_ELEMENTS // num_checkpoints))


def block_elements(inputs: Inputs, device: torch.device) -> int:
    """Return the elements of a block; fewer where all experts' deltas of it are alive at once."""
    size = _BLOCK_ELEMENTS[device.type]
    if inputs.recipe.parameters.mutation != "compound":
        return size
    return max(1 << 14, size * 16 // (16 + inputs.num_experts))


def child_block_elements(inputs: Inputs, device: torch.device) -> int:
    """Return the elements of a block of which children are made."""
    size = block_elements(inputs, device)
    return min(size, _CHILD_ELEMENTS) if device.type == "cpu" else size


def count_workers(inputs: Inputs, devices: Sequence[torch.device]) -> int:
    """Return how many threads work on blocks at a time."""
    return merge_workers(devices, _block_bytes(inputs, devices[0]))


def merge_memory(inputs: Inputs, devices: Sequence[torch.device]) -> int:
    """Return the bytes both passes hold at their peak: blocks, whatever the size of the model."""
    stored = map(stored_model, inputs.checkpoints)
    adapters = [model for model in stored if isinstance(model, Adapter)]
    block = _block_bytes(inputs, devices[0])
    # Adapters are compared by their factors side by side, in float64 and stacked.
    factors = max(4 * sum(adapter.factor_bytes for adapter in adapters), block)
    cached = sum(adapter.cached_bytes for adapter in adapters)
    # One block more than there are threads waits with its result.
    return (count_workers(inputs, devices) + 1) * factors + cached


def _block_bytes(inputs: Inputs, device: torch.device) -> int:
    """Return the bytes of RAM a block takes, with both passes' arithmetic in one.

    The stored values of all models, their deltas in float32, and a handful of temporaries; the
    Gram matrix of the same block, in float64, is over by the time the experts begin.
    """
    elements, num_models = block_elements(inputs, device), len(inputs.models)
    if device.type != "cpu":  # the arithmetic is elsewhere; values come and go
        return elements * (4 * num_models + 8)
    compound = inputs.recipe.parameters.mutation == "compound"
    deltas = num_models + (inputs.num_experts if compound else 0)
    return elements * (4 * num_models + max(4 * deltas + 24, 8 * (num_models + 1)))
