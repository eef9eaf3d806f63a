"""Experts in 4 bits while LoRA is trained: bitsandbytes itself leaves them, as no linear layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from upit_merge.errors import UpitError
from upit_merge.training.trainable import expert_matrices

LOG = logging.getLogger(__name__)

_GB = 1e9


def quantise_experts(model: nn.Module, settings: Any, *, checkpointing: bool = True) -> None:
    """Bring the experts of a mixture to 4 bits, if the rest of it is loaded so.

    Args:
        model: PEFT's, on transformers' mixture. Factors for experts are there already: PEFT does
            not find a parameter that is quantised.
        settings: TRL's `ModelConfig`.
        checkpointing: Whether layers are computed again for the backward pass.

    Raises:
        UpitError: bitsandbytes or PEFT is of a version with which that does not work.
    """
    experts = list(expert_matrices(model))
    size = sum(getattr(module, name).nbytes for module, name in experts)
    if settings.load_in_8bit:
        LOG.warning(
            "load_in_8bit does not reach the experts, %.1f GB that stay as they are, for which "
            "bitsandbytes has no 8 bits; load_in_4bit does.",
            size / _GB,
        )
    if not settings.load_in_4bit or not experts:
        return
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError:
        raise UpitError(
            "load_in_4bit needs a newer bitsandbytes, as this one cannot bring experts to 4 bits; "
            "run `pip install -U bitsandbytes`."
        ) from None
    shapes = {}
    for module, name in experts:
        parameter = getattr(module, name)
        # As large as it and of its dtype, but a single number.
        shape = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(
            parameter.shape
        )
        replace_parameter_4bit(
            module,
            name,
            compress_statistics=settings.use_bnb_nested_quant,
            quant_type=settings.bnb_4bit_quant_type,
        )
        held: Any = module.parametrizations
        shapes[id(held[name])] = shape
    _keep_quantised(model, shapes)
    after = sum(parameter.nbytes for module, _name in experts for parameter in module.parameters())
    if not checkpointing:
        LOG.warning(
            "gradient_checkpointing is off, so that all experts are kept in more bits for the "
            "backward pass, and load_in_4bit saves nothing; turn it on."
        )
    LOG.info("The experts take %.1f GB in 4 bits, %.1f GB before.", after / _GB, size / _GB)


def _keep_quantised(model: nn.Module, shapes: Mapping[int, torch.Tensor]) -> None:
    """Make PEFT's factors for experts work on parameters in 4 bits.

    A pass puts them on top of the parametrisation that makes numbers of 4 bits, and takes them off
    again by their class. PEFT up to 0.21.2 does not know the class that it uses for several
    experts, so that they would pile up.

    Args:
        shapes: What a parameter looks like to PEFT, by the parametrisations it has.
    """
    from peft.tuners.lora.layer import ParamWrapper

    for wrapper in model.modules():
        if not isinstance(wrapper, ParamWrapper):
            continue
        held = getattr(wrapper.get_base_layer(), "parametrizations", {})
        if wrapper.parameter_name not in held:
            continue
        stack: Any = held[wrapper.parameter_name]
        vars(wrapper)["_remove_parametrizations"] = partial(stack.__delitem__, -1)
        vars(wrapper)["get_param"] = partial(shapes.__getitem__, id(stack))
        key = (id(wrapper.get_base_layer()), wrapper.parameter_name)
        vars(wrapper)["_activate_lora"] = partial(_activated, wrapper._activate_lora, key)
        with torch.no_grad(), wrapper._activate_lora(wrapper.active_adapters):
            there = len(stack)
        if (there, len(stack)) != (2, 1):
            raise UpitError(
                "This version of PEFT cannot train LoRA on experts in 4 bits; install the one that "
                "constraints.txt pins, or remove load_in_4bit."
            )


@contextmanager
def _activated(
    activate: Callable[..., AbstractContextManager[None]], key: tuple[int, str], adapters: list[str]
) -> Iterator[None]:
    """Put factors on a parameter, and forget what torch has cached of it without them.

    It has if another parameter of the module has factors too: to register a parametrisation looks
    at the value before.
    """
    with activate(adapters):
        parametrize._cache.pop(key, None)
        yield
