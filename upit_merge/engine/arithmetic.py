"""In which dtypes a mixture is computed: `compute:` of the recipe's `router:` block, resolved."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

Compute = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Arithmetic:
    """Dtypes of a computation layer by layer.

    Where the two differ, only matrix products are rounded: the residual stream, norms, logits,
    losses and whatever is summed over samples have the dtype of the states.

    Attributes:
        states: Of hidden states, norms and the output head.
        products: Of the matrices of a layer, and of what is multiplied by them.
    """

    states: torch.dtype
    products: torch.dtype

    @classmethod
    def of(
        cls,
        compute: Compute,
        device: torch.device,
        stored: torch.dtype,
        *,
        quick: bool = False,
    ) -> Arithmetic:
        """Resolve the setting for a device.

        Args:
            compute: On a GPU `auto` is the stored dtype, and all is computed in one dtype.
            stored: Of the mixture.
            quick: On the CPU, `auto` means products in bfloat16.
        """
        if device.type == "cpu":
            rounded = compute == "bfloat16" or (compute == "auto" and quick)
            return cls(torch.float32, torch.bfloat16 if rounded else torch.float32)
        dtype = stored if compute == "auto" else getattr(torch, compute)
        return cls(dtype, dtype)

    @property
    def name(self) -> str:
        """The dtype of the products, as a report has it."""
        return str(self.products).removeprefix("torch.")

    def identity(self) -> str:
        """Return what tells results apart that must not be mixed."""
        return f"{self.name}, states in {str(self.states).removeprefix('torch.')}"

    def active(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Return the context in which a layer is to be called."""
        if self.states == self.products:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.products)


def has_fast_bfloat16() -> bool:
    """Return whether this machine's CPU multiplies in bfloat16: by AVX512-BF16 or AMX.

    Others can too, in software, which is slower than float32.
    """
    if capabilities := getattr(torch.cpu, "get_capabilities", None):
        found = capabilities()
        return any(bool(found.get(flag)) for flag in ("avx512_bf16", "amx_bf16"))
    # torch 2.6 to 2.12 have no public name for it. All CPUs with AMX tiles have AMX-BF16.
    private = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in private)
