"""The whole mixture, layer by layer: memory holds one layer with all its experts, and the next.

Computed with transformers' own decoder layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.hidden_states import Batch, PackedStates
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.runtime.parallel import map_in_order

# (layer, samples of the batch, logits (tokens, experts), chosen experts (tokens, top-k)), without
# padding: the tokens of the first sample, then those of the second, …
RoutingCallback = Callable[[int, Batch, Tensor, Tensor], None]


class AssembledMixture:
    """A mixture whose layers are loaded one at a time.

    Args:
        model: The folder.
        gates: Instead of the folder's, float32, (num_experts, hidden_size) per layer.
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
        self._config = copy.deepcopy(model.architecture.config)
        self._config._attn_implementation = "sdpa"
        self._config._experts_implementation = "eager"
        self._keep = self.layer_bytes * model.num_layers <= keep_bytes
        self._kept: dict[int, nn.Module] = {}

    @property
    def layer_bytes(self) -> int:
        """What one layer takes in memory."""
        prefix = "model.layers.0."
        specs = self.model.moe.specs
        elements = sum(spec.numel for name, spec in specs.items() if name.startswith(prefix))
        return elements * self.model.arithmetic.products.itemsize

    def set_gates(self, gates: Sequence[Tensor]) -> None:
        """Use other gates from now on, float32, (num_experts, hidden_size) per layer."""
        self._gates = gates
        for layer, module in self._kept.items():
            module.get_parameter("mlp.gate.weight").data = self._gate(layer)

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
        model, name_of = self.model, self.model.format.expert_tensor
        with torch.device("meta"):
            module = model.format.modules().moe_layer(self._config, layer)
        state = model.backbone(layer)
        up = "mlp.experts.gate_up_proj"
        down = "mlp.experts.down_proj"
        for name in (up, down):
            shape = module.get_parameter(name).shape
            state[name] = torch.empty(shape, dtype=model.arithmetic.products, device=model.device)
        inner = model.architecture.intermediate_size
        for expert in range(model.num_experts):
            # transformers keeps the two input projections of an expert as one matrix.
            state[up][expert, :inner] = model.load(name_of(layer, expert, "gate_proj"))
            state[up][expert, inner:] = model.load(name_of(layer, expert, "up_proj"))
            state[down][expert] = model.load(name_of(layer, expert, "down_proj"))
        state["mlp.gate.weight"] = self._gate(layer)
        module.load_state_dict(state, assign=True)
        # Which experts are chosen is decided in the dtype of the states.
        gate = module.get_submodule("mlp.gate")
        gate.forward = torch.autocast(model.device.type, enabled=False)(gate.forward)
        return module.eval().requires_grad_(False)

    def _gate(self, layer: int) -> Tensor:
        if self._gates is None:
            return self.model.load(self.model.format.gate_tensor(layer), product=False)
        # Rounded, as the stored model will have it.
        stored = self.model.moe.specs[self.model.format.gate_tensor(layer)].dtype
        return self._gates[layer].to(stored).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def sweep(
        self,
        samples: Sequence[TokenizedSample],
        batches: Sequence[Batch],
        states: PackedStates,
        *,
        on_routing: RoutingCallback,
        on_progress: Callable[[float], object],
    ) -> None:
        """Push samples through all layers; `states` holds what comes out.

        Args:
            samples: All samples.
            batches: Those of this process.
            states: Hidden states, filled by this method from the embeddings on.
            on_routing: Told what the router did, layer by layer and batch by batch.
            on_progress: Called with the number of tokens done.
        """
        self.model.embed(samples, states)
        with contextlib.closing(self.layers(range(self.model.num_layers))) as layers:
            for number, module in enumerate(layers):
                for batch in batches:
                    padded = states.padded(batch).to(self.model.device)
                    states.put(batch, self.run(module, padded, states, batch, number, on_routing))
                    on_progress(sum(len(samples[index].input_ids) for index in batch))

    def run(
        self,
        module: nn.Module,
        padded: Tensor,
        states: PackedStates,
        batch: Batch,
        layer: int,
        on_routing: RoutingCallback,
    ) -> Tensor:
        """One layer on one padded batch, (samples, tokens, hidden_size); tells what was routed."""
        spans = [states.span(index) for index in batch]
        lengths = torch.tensor([span.stop - span.start for span in spans], device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)

        def look(_gate: nn.Module, _inputs: Any, routed: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, _weights, chosen = routed
            kept = real.flatten()
            on_routing(layer, batch, logits[kept].float(), chosen[kept])

        handle = module.get_submodule("mlp.gate").register_forward_hook(look)
        try:
            return self.model.layer_output(module, padded)
        finally:
            handle.remove()
