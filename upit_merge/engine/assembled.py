"""The whole mixture, layer by layer: memory holds one layer with all its experts, and the next.

Computed with transformers' own decoder layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.hidden_states import Batch, PackedStates
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.formats import FUSED
from upit_merge.runtime.parallel import map_in_order

# (number of the mixture, samples of the batch, logits (tokens, experts), chosen experts (tokens,
# top-k)), without padding: the tokens of the first sample, then those of the second, …
RoutingCallback = Callable[[int, Batch, Tensor, Tensor], None]


@dataclass(frozen=True)
class Handed:
    """What a layer's experts are handed by their router: in all formats the same, and all of it.

    Attributes:
        layer: Number of the mixture.
        batch: Samples of the batch; tokens are in their order, without padding.
        logits: Of the router, float32, (tokens, num_experts).
        chosen: Experts, (tokens, top-k), the one with the largest weight first.
        weights: By which their outputs are multiplied, float32, of this shape.
        hidden: What the experts see, (tokens, hidden_size).
        experts: transformers' module of all experts.
    """

    layer: int
    batch: Batch
    logits: Tensor
    chosen: Tensor
    weights: Tensor
    hidden: Tensor
    experts: nn.Module

    def output_norms(self) -> Tensor:
        """Return L2 norms of what the chosen give, before the weights, float32, (tokens, top-k)."""
        # Of one choice at a time with weight 1: what the module adds up is then one expert's.
        one = self.hidden.new_ones(len(self.hidden), 1)
        columns = self.chosen.split(1, dim=1)
        outputs = (self.experts.forward(self.hidden, column, one) for column in columns)
        return torch.stack([output.float().norm(dim=-1) for output in outputs], dim=1)


HandedCallback = Callable[[Handed], None]


class AssembledMixture:
    """A mixture whose layers are loaded one at a time.

    Args:
        model: The folder.
        gates: Instead of the folder's, float32, (num_experts, hidden_size) per mixture.
        keep_bytes: Layers are kept in memory if all of them fit into this.
    """

    def __init__(
        self,
        model: LayerwiseMixture,
        gates: Sequence[Tensor] | None = None,
        *,
        keep_bytes: float = 0,
    ) -> None:
        self.model = model
        self._gates = gates
        self._keep = self.layer_bytes * model.num_layers <= keep_bytes
        self._kept: dict[int, nn.Module] = {}

    @property
    def layer_bytes(self) -> int:
        """What the last layer, which is a mixture, takes in memory."""
        prefix = self.model.format.layer_prefix(self.model.num_layers - 1)
        specs = self.model.moe.specs
        elements = sum(spec.numel for name, spec in specs.items() if name.startswith(prefix))
        return elements * self.model.arithmetic.products.itemsize

    def set_gates(self, gates: Sequence[Tensor]) -> None:
        """Use other gates from now on, float32, (num_experts, hidden_size) per mixture."""
        self._gates = gates
        for layer, module in self._kept.items():
            if layer in self.model.mixture_layers:
                self.gate_of(module).data = self._gate(layer)

    def gate_of(self, module: nn.Module) -> nn.Parameter:
        """Return the gate in a mixture's layer."""
        return module.get_parameter(f"{self.model.format.gate_path}.weight")

    def layers(self, order: Iterable[int]) -> Generator[nn.Module]:
        """Yield the decoder layers of these numbers; the next one is being read meanwhile."""
        if not self._keep:
            yield from map_in_order(self._read, order, workers=1)
            return
        for layer in order:
            if layer not in self._kept:
                self._kept[layer] = self._read(layer)
            yield self._kept[layer]

    def _read(self, layer: int) -> nn.Module:
        model, form = self.model, self.model.format
        module = model.body.layer(layer)
        state = model.backbone(layer)
        if layer not in model.mixture_layers:
            module.load_state_dict(state, assign=True)
            return module.eval().requires_grad_(False)
        # transformers keeps the two input projections of an expert as one matrix.
        names = {kind: f"{form.experts_path}.{kind}" for kind in FUSED}
        for name in names.values():
            shape = module.get_parameter(name).shape
            state[name] = torch.empty(shape, dtype=model.arithmetic.products, device=model.device)
        for expert in range(model.num_experts):
            for kind, projections in FUSED.items():
                rows = state[names[kind]][expert].chunk(len(projections))
                for projection, part in zip(projections, rows, strict=True):
                    part.copy_(model.load(form.expert_tensor(layer, expert, projection)))
        state[f"{form.gate_path}.weight"] = self._gate(layer)
        module.load_state_dict(state, assign=True)
        # Which experts are chosen is decided in the dtype of the states.
        gate = module.get_submodule(form.gate_path)
        gate.forward = torch.autocast(model.device.type, enabled=False)(gate.forward)
        return module.eval().requires_grad_(False)

    def _gate(self, layer: int) -> Tensor:
        name = self.model.format.gate_tensor(layer)
        if self._gates is None:
            return self.model.load(name, product=False)
        # Rounded, as the stored model will have it.
        gate = self._gates[self.model.mixture_layers.index(layer)]
        return gate.to(self.model.moe.specs[name].dtype).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def sweep(
        self,
        samples: Sequence[TokenizedSample],
        batches: Sequence[Batch],
        states: PackedStates,
        *,
        on_routing: RoutingCallback,
        on_progress: Callable[[float], object],
        on_handed: HandedCallback | None = None,
    ) -> None:
        """Push samples through all layers; `states` holds what comes out.

        Args:
            samples: All samples.
            batches: Those of this process.
            states: Hidden states, filled by this method from the embeddings on.
            on_routing: Told what the router did, layer by layer and batch by batch.
            on_progress: Called with the number of tokens done.
            on_handed: Told what the experts are handed.
        """
        self.model.embed(samples, states)
        with contextlib.closing(self.layers(range(self.model.num_layers))) as layers:
            for number, module in enumerate(layers):
                for batch in batches:
                    padded = states.padded(batch).to(self.model.device)
                    told = on_routing, on_handed
                    states.put(batch, self.run(module, padded, states, batch, number, *told))
                    on_progress(sum(len(samples[index].input_ids) for index in batch))

    def run(
        self,
        module: nn.Module,
        padded: Tensor,
        states: PackedStates,
        batch: Batch,
        layer: int,
        on_routing: RoutingCallback,
        on_handed: HandedCallback | None = None,
    ) -> Tensor:
        """One layer on one padded batch, (samples, tokens, hidden_size); tells what was routed."""
        spans = [states.span(index) for index in batch]
        lengths = torch.tensor([span.stop - span.start for span in spans], device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)

        kept = real.flatten()
        seen: list[Tensor] = []

        def look(_gate: nn.Module, _inputs: Any, routed: Any) -> None:
            if isinstance(routed, tuple):
                logits, chosen = routed[0][kept], routed[2][kept]
            else:  # a matrix alone, whose largest results decide
                logits = routed[kept]
                chosen = logits.detach().topk(top_k, dim=1).indices
            # Not every router gives the first choice first.
            order = logits.detach().gather(1, chosen).argsort(dim=1, descending=True, stable=True)
            seen.append(logits.float())
            on_routing(number, batch, seen[0], chosen.gather(1, order))

        def hand(experts: nn.Module, inputs: Any) -> None:
            assert on_handed is not None
            hidden, chosen, weights = (part.flatten(0, -2)[kept] for part in inputs)
            weights, order = weights.float().sort(dim=1, descending=True, stable=True)
            chosen = chosen.gather(1, order)
            on_handed(Handed(number, batch, seen[0], chosen, weights, hidden, experts))

        model = self.model
        if layer not in model.mixture_layers:
            return model.layer_output(module, layer, padded)
        number = model.mixture_layers.index(layer)
        top_k = model.format.chosen(model.architecture.config)
        with contextlib.ExitStack() as hooks:
            gate = module.get_submodule(model.format.gate_path)
            hooks.callback(gate.register_forward_hook(look).remove)
            if on_handed is not None:
                experts = module.get_submodule(model.format.experts_path)
                hooks.callback(experts.register_forward_pre_hook(hand).remove)
            return model.layer_output(module, layer, padded)
