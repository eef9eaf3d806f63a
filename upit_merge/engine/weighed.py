"""The whole mixture, layer by layer, with what every chosen expert counts for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.engine.assembled import AssembledMixture, RoutingCallback
from upit_merge.engine.hidden_states import Batch, PackedStates
from upit_merge.engine.layerwise import LayerwiseMixture

# (number of the mixture, samples of the batch, logits (tokens, experts), chosen experts (tokens,
# top-k), the weights that their outputs are multiplied by), without padding; the first weighs most.
ChoiceCallback = Callable[[int, Batch, Tensor, Tensor, Tensor], None]


class WeighedMixture(AssembledMixture):
    """A mixture whose layers are loaded one at a time, and which tells the weights of the experts.

    Every family of routers makes them in its own way: they are taken where transformers hands them
    to the experts.

    Args:
        model: The folder.
        on_choice: Told what every layer did with a batch.
    """

    def __init__(self, model: LayerwiseMixture, on_choice: ChoiceCallback) -> None:
        super().__init__(model)
        self._on_choice = on_choice

    def run(
        self,
        module: nn.Module,
        padded: Tensor,
        states: PackedStates,
        batch: Batch,
        layer: int,
        on_routing: RoutingCallback,
    ) -> Tensor:
        if layer not in self.model.mixture_layers:
            return super().run(module, padded, states, batch, layer, on_routing)
        handed: list[tuple[Tensor, Tensor]] = []
        told: list[tuple[int, Tensor]] = []

        def keep(_experts: nn.Module, inputs: Any) -> None:
            _states, chosen, weights = inputs
            handed.append((chosen, weights))

        def look(number: int, batch: Batch, logits: Tensor, chosen: Tensor) -> None:
            told.append((number, logits))
            on_routing(number, batch, logits, chosen)

        experts = module.get_submodule(self.model.format.experts_path)
        handle = experts.register_forward_pre_hook(keep)
        try:
            output = super().run(module, padded, states, batch, layer, look)
        finally:
            handle.remove()
        ((chosen, weights),), ((number, logits),) = handed, told
        spans = [states.span(index) for index in batch]
        rows = torch.cat(
            [
                torch.arange(span.stop - span.start) + place * padded.shape[1]
                for place, span in enumerate(spans)
            ]
        ).to(weights.device)
        chosen, weights = chosen[rows], weights[rows].float()
        order = weights.argsort(dim=1, descending=True, stable=True)
        self._on_choice(number, batch, logits, chosen.gather(1, order), weights.gather(1, order))
        return output
