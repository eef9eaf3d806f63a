"""A whole mixture in memory: which experts its tokens take, and one expert for all of them.

Read at the experts, not at the router: what these are called with, (hidden states, chosen experts,
their weights), has one form in all formats, with every bias, group and scale applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.engine.choices import Choices
from upit_merge.models.formats import MixtureFormat


def has_experts(model: Any, form: MixtureFormat) -> bool:
    """Return whether any layer of transformers' model of a mixture has experts."""
    layers = getattr(model.base_model, "layers", [])
    return any(form.experts_path in dict(layer.named_modules()) for layer in layers)


class RoutedModel:
    """transformers' model of a mixture, whose experts are watched.

    Args:
        model: With all its weights.
        form: Its format.
    """

    def __init__(self, model: nn.Module, form: MixtureFormat) -> None:
        body: Any = model.base_model
        self.experts: dict[int, nn.Module] = {}
        for number, layer in enumerate(body.layers):
            modules = dict(layer.named_modules())
            if form.experts_path not in modules:  # a dense layer
                continue
            self.experts[number] = modules[form.experts_path]
        first: Any = next(iter(self.experts.values()))
        self.num_experts: int = first.num_experts

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Recording]:
        """Record what the experts are called with inside."""
        recording = Recording(tuple(self.experts))
        with contextlib.ExitStack() as stack:
            for number, experts in self.experts.items():
                handle = experts.register_forward_pre_hook(recording.hook(number))
                stack.callback(handle.remove)
            yield recording

    @contextlib.contextmanager
    def alone(self, expert: int) -> Iterator[None]:
        """Let all tokens take one expert in every layer inside.

        The model then is that of as many identical experts: their outputs are multiplied by what
        the router gives to all the experts that it chooses, which not every router makes 1. (Gemma
        4's also scales each expert, which a norm behind them takes out again.)
        """

        def send(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states, chosen, weights = inputs
            return states, torch.full_like(chosen[:, :1], expert), weights.sum(1, keepdim=True)

        with contextlib.ExitStack() as stack:
            for experts in self.experts.values():
                stack.callback(experts.register_forward_pre_hook(send).remove)
            yield


class Recording:
    """What was recorded, layer by layer and call by call.

    Args:
        layers: The numbers of the layers.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._calls: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def hook(self, layer: int) -> Any:
        """Return the hook of a layer's experts."""

        def look(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _states, chosen, weights = inputs
            weights, order = weights.detach().float().sort(dim=1, descending=True, stable=True)
            self._calls[layer].append((chosen.gather(1, order), weights))  # no waiting for a GPU

        return look

    def answered(self) -> Choices | None:
        """Return those of all tokens but the prompt, which was read in the first call."""
        # Ctrl-C may have come between two layers.
        stop = min(map(len, self._calls.values()))
        if stop < 2:
            return None
        parts = [zip(*calls[1:stop], strict=True) for calls in self._calls.values()]
        kinds = zip(*([torch.cat(kind) for kind in part] for part in parts), strict=True)
        return self._choices(kinds)

    def of_token(self, number: int) -> Choices | None:
        """Return those of the so-manieth token after the prompt, if it was read."""
        if min(map(len, self._calls.values())) < number + 2:
            return None
        parts = [calls[number + 1] for calls in self._calls.values()]
        return self._choices(zip(*parts, strict=True))

    def _choices(self, kinds: Iterable[tuple[Tensor, ...]]) -> Choices:
        experts, weights = (torch.stack([part.cpu() for part in kind]) for kind in kinds)
        return Choices(tuple(self._calls), experts, weights)
