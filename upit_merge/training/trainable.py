"""Which weights are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from upit_merge.errors import UpitError
from upit_merge.models.formats import FORMATS, found_format

# By transformers' names in memory: `.mlp.gate` is a router, `.mlp.gate_proj` part of an FFN.
_GATES = "|".join(sorted({re.escape(form.gate_path) for form in FORMATS.values()}))
_EXPERTS = "|".join(sorted({re.escape(form.experts_path) for form in FORMATS.values()}))
_ROUTER = re.compile(rf"\.(?:{_GATES})\.")
_FFN = re.compile(rf"\.(?:mlp|{_GATES}|{_EXPERTS})\.")
_STACKED = 3  # dimensions of a matrix of all experts


def freeze_others(model: nn.Module, train_modules: str) -> int:
    """Leave only some of a model's weights trainable.

    Args:
        model: Dense or a mixture, of transformers.
        train_modules: `all`; `ffn`, the FFNs, of a mixture with its router; or `router`.

    Returns:
        The number of trainable parameters.

    Raises:
        UpitError: the model has none of that kind.
    """
    pattern = {"ffn": _FFN, "router": _ROUTER}.get(train_modules)
    if pattern is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(pattern.search(f".{name}")))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise UpitError(
            f"train_modules: {train_modules} leaves nothing to train, as the model has no such "
            "weights; use all."
        )
    return count


def expert_matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every parameter that holds a matrix of all experts, (experts, rows, columns).

    As its module and its name there. What else has three dimensions are convolutions.
    """
    for module in _modules_at(_EXPERTS, model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == _STACKED and parameter.is_floating_point():
                yield module, name


def routers(model: Any) -> list[nn.Module]:
    """Return the routers of a mixture in the order of its layers; none for a dense model.

    Each returns its logits, (tokens, num_experts), first and the chosen experts,
    (tokens, experts_per_token), last; or the logits alone, whose largest `top_k` decide.
    """
    form = found_format(model.config.to_dict()) if hasattr(model, "config") else None
    if form is not None and form.router_is_linear:
        for name, module in model.named_modules():
            if name.endswith(f".{form.gate_path}"):
                module.__dict__["top_k"] = form.chosen(model.config)
    return [
        module
        for module in _modules_at(_GATES, model)
        if isinstance(module.__dict__.get("top_k"), int)
    ]


def _modules_at(paths: str, model: nn.Module) -> list[nn.Module]:
    """Return the modules whose names end so, in the order of the layers, and those inside of PEFT's.

    PEFT wraps a module whose weight has factors: the module itself is further inside.
    """
    pattern = re.compile(rf"\.(?:{paths})(\.base_layer)*$")
    return [module for name, module in model.named_modules() if pattern.search(f".{name}")]
