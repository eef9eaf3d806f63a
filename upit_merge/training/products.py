"""How a mixture's experts are multiplied while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.models.formats import fits_grouped_products
from upit_merge.training.trainable import expert_matrices

_GROUPED = "grouped_mm"  # what transformers takes by itself
_IN_AUTOCAST = "grouped_mm_in_autocast"


def choose_products(model: Any, *, mixed: bool) -> None:
    """Let a mixture's experts be multiplied in a way that works, and in the dtype that is asked for.

    torch has no rule of autocast for `torch.nn.functional.grouped_mm` (2.13), so that experts with
    float32 weights, as TRL loads them, are multiplied in float32 while `bf16: true` brings all else
    to bfloat16; and it refuses some sizes, whose experts are multiplied one after the other.

    Args:
        model: PEFT's or transformers', before its first pass. One whose experts are multiplied
            otherwise is left as it is.
        mixed: Whether it is trained under autocast.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config, "_experts_implementation", None) != _GROUPED:
        return
    matrices = [getattr(module, name) for module, name in expert_matrices(inner)]
    if not fits_grouped_products(size for matrix in matrices for size in matrix.shape[1:]):
        inner.set_experts_implementation("eager")
    elif mixed and _know_autocast():
        inner.set_experts_implementation(_IN_AUTOCAST)


def _know_autocast() -> bool:
    """Tell transformers of grouped products in the dtype of autocast; False if it has none."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
    except ImportError:  # elsewhere than in 5.24
        return False

    def forward(experts: nn.Module, states: Tensor, index: Tensor, weights: Tensor) -> Any:
        kind = states.device.type
        seen: Any = experts
        if torch.is_autocast_enabled(kind):
            seen = _Cast(experts, torch.get_autocast_dtype(kind))
        return grouped_mm_experts_forward(seen, states, index, weights)

    ALL_EXPERTS_FUNCTIONS.register(_IN_AUTOCAST, forward)
    return True


class _Cast:
    """A module whose weights are read in another dtype; their gradients have their own."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return found.to(self._dtype) if isinstance(found, Tensor) else found
