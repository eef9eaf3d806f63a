"""transformers' own model of a mixture, without weights: what its layers are, and are called with.

Nothing here knows a family: masks, rotary tables and whatever else a layer is given are those that
the model's own forward pass gives it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.models.formats import MixtureFormat
from upit_merge.models.mixture import MixtureArchitecture


class DenseExperts(nn.Module):
    """Stands where a layer has its experts: one FFN for all tokens, whatever the router says.

    Args:
        hidden_act: Name of the activation.
        hidden_size, inner_size: Of the FFN.
    """

    def __init__(self, hidden_act: str, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.activation = ACT2FN[hidden_act]
        self.gate_proj, self.up_proj = (
            nn.Linear(hidden_size, inner_size, bias=False, device="meta") for _ in range(2)
        )
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False, device="meta")

    def forward(self, hidden_states: Tensor, *_routing: Tensor) -> Tensor:
        inner = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        outputs: Tensor = self.down_proj(inner)
        return outputs


class Body:
    """A mixture's model on the meta device.

    Args:
        architecture: Of the mixture.
        device: Where layers are computed.
    """

    def __init__(self, architecture: MixtureArchitecture, device: torch.device) -> None:
        self.format: MixtureFormat = architecture.format
        self.architecture = architecture
        self.device = device
        config = copy.deepcopy(architecture.config)
        config._attn_implementation = self.format.attention
        config._experts_implementation = "eager"
        self.config = config
        model = self.format.model(config)
        self._body: Any = model.base_model
        self._layer: Any = type(self._body.layers[0])
        self.norm: nn.Module = self.format.final_norm(self._body)
        self._recorders = nn.ModuleList(_Recorder() for _ in self._body.layers)
        self._body.layers = self._recorders
        for name, module in list(self._body.named_children()):
            if module is self.norm:  # which has no weights here
                setattr(self._body, name, nn.Identity())
        compute_tables(self._body, config, device)
        self._body.eval()

    def layer(self, layer: int) -> nn.Module:
        """A decoder layer, its weights still without values."""
        with torch.device("meta"):
            module: nn.Module = self._layer(self.config, layer)
        return module

    def dense_layer(self, layer: int) -> nn.Module:
        """A decoder layer in which one FFN stands for all experts, if it has any."""
        module = self.layer(layer)
        if self.is_mixture(layer):
            one_expert(module, self.architecture)
        return module

    def is_mixture(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return layer in self.architecture.mixture_layers

    @torch.no_grad()
    def call(self, layer: int, batch: Tensor) -> dict[str, Any]:
        """What a layer is called with beside its hidden states, on a right-padded batch.

        Padding follows every real token, so that causal masks alone keep it out of them.

        Args:
            batch: (samples, tokens, hidden_size).
        """
        self._body(inputs_embeds=batch, use_cache=False)
        return dict(self._recorders[layer].called_with)  # type: ignore[arg-type]

    def watch(
        self, module: nn.Module, layer: int, look: Callable[[Tensor], object]
    ) -> torch.utils.hooks.RemovableHandle:
        """Show what the gate of a layer sees, (tokens, hidden_size), whenever it runs."""
        assert self.is_mixture(layer)
        gate = module.get_submodule(self.format.gate_path)
        return gate.register_forward_pre_hook(lambda _gate, inputs: look(inputs[0]))


def one_expert(layer: nn.Module, architecture: MixtureArchitecture) -> None:
    """Let one FFN stand for all experts of a decoder layer; its weights are without values."""
    settings = architecture.dense_settings()
    sizes = settings["hidden_size"], architecture.intermediate_size
    experts = DenseExperts(settings["hidden_act"], *sizes)
    layer.set_submodule(architecture.format.experts_path, experts, strict=True)


def compute_tables(body: nn.Module, config: Any, device: torch.device) -> None:
    """Give a model that was made on the meta device its rotary tables: they are not loaded."""
    for name, module in list(body.named_modules()):
        inside = module.buffers(recurse=False)
        if isinstance(module, nn.Embedding):
            if "embed_scale" in module._buffers:  # Gemma's, which is not stored
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif not name.startswith("layers") and any(buffer.is_meta for buffer in inside):
            # There may be several, each with a configuration of its own.
            own = getattr(module, "config", config)
            body.set_submodule(name, type(module)(config=own).to(device), strict=True)


class _Recorder(nn.Module):
    """Stands where a layer is: keeps what it would have been given, and passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.called_with: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *_per_layer: None, **called_with: Any) -> Tensor:
        self.called_with = called_with
        return hidden_states
