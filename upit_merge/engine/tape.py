"""An FFN differentiated by hand: what it saw, and the slopes of what its matrices gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit_merge.engine.layerwise import Weights


@dataclass
class Tape:
    """What an FFN saw of a padded batch, and the slopes of its projections' outputs.

    All are (samples · tokens, ·), however many dimensions the layer has made of it.
    """

    inputs: Tensor
    gate: Tensor
    up: Tensor
    inner: Tensor
    output: Tensor
    scale: float = 1.0
    samples: int = 1

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """(slopes of the output, inputs) of a projection, (samples, tokens, ·) each."""
        pair = (self.gate if projection == "gate_proj" else self.up), self.inputs
        if projection == "down_proj":
            pair = self.output, self.inner
        outer, inputs = (part.view(self.samples, -1, part.shape[-1]) for part in pair)
        return outer, inputs


class Taped(nn.Module):
    """Stands for the experts in a layer that is computed again to be differentiated.

    Their input and the slope of their output are kept.

    Args:
        summed: Nothing but a sum follows their output, so that it does not matter then, and is
            not computed.
    """

    def __init__(
        self, weights: Weights, activation: Callable[[Tensor], Tensor], *, summed: bool
    ) -> None:
        super().__init__()
        self.weights = weights
        self.activation = activation
        self.summed = summed
        self.tape: Tape | None = None

    def forward(self, inputs: Tensor, *_routing: Tensor) -> Tensor:
        return _Differentiated.apply(inputs, self)


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, ffn: Taped) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.ffn = ffn
        if ffn.summed:
            return inputs.new_zeros(()).expand_as(inputs)
        gate, up, down = (ffn.weights[name] for name in ("gate_proj", "up_proj", "down_proj"))
        seen = inputs.to(gate.dtype)
        inner = ffn.activation(F.linear(seen, gate)) * F.linear(seen, up)
        return F.linear(inner, down).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (inputs,) = ctx.saved_tensors
        ffn: Taped = ctx.ffn
        weights = ffn.weights
        # A backward pass is outside of what casts for the layer.
        seen = inputs.to(weights["gate_proj"].dtype)
        slope = slope.to(seen.dtype).contiguous()
        with torch.no_grad():
            gate = F.linear(seen, weights["gate_proj"])
            up = F.linear(seen, weights["up_proj"])
            outer = slope @ weights["down_proj"]
        with torch.enable_grad():
            inner = ffn.activation(gate.requires_grad_()) * up.requires_grad_()
        into_gate, into_up = torch.autograd.grad(inner, [gate, up], outer)
        with torch.no_grad():
            into = into_gate @ weights["gate_proj"] + into_up @ weights["up_proj"]
        ffn.tape = Tape(seen, into_gate, into_up, inner.detach(), slope)
        return into.to(inputs.dtype), None
