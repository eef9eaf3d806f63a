"""`density` per tensor and checkpoint, by mergekit's rules: gradients over layers and filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from upit_merge.config.recipe import Density, FilteredDensity, Parameters
from upit_merge.errors import UpitError
from upit_merge.models.dense import DenseArchitecture

_DEFAULT = Parameters.model_fields["density"].default


def _as_mergekit(setting: Density) -> Any:
    """Our strict type as the one mergekit's resolver takes."""
    from mergekit.config import ConditionalParameter

    if isinstance(setting, FilteredDensity):
        return ConditionalParameter(value=setting.value, filter=setting.filter)
    if isinstance(setting, list):
        return [_as_mergekit(s) if isinstance(s, FilteredDensity) else s for s in setting]
    return setting


def _check_idle_filters(architecture: DenseArchitecture, settings: Sequence[Density]) -> None:
    names = [name for _layer, _projection, name in architecture.ffn_names()]
    for setting in settings:
        for condition in setting if isinstance(setting, list) else [setting]:
            pattern = condition.filter if isinstance(condition, FilteredDensity) else None
            if pattern in (None, "*") or any(pattern in name for name in names):
                continue
            raise UpitError(
                f"density: the filter {pattern!r} matches no FFN tensor; use a part of a name such "
                f"as {names[-1]}."
            )


def resolve_densities(
    architecture: DenseArchitecture, shared: Density, per_model: Sequence[Density | None]
) -> torch.Tensor:
    """Return the share of entries DARE keeps, for every FFN tensor and checkpoint.

    Args:
        architecture: Names the FFN tensors, in order.
        shared: The recipe's `density`.
        per_model: An entry's own `density`, or None, for every checkpoint; it wins.

    Returns:
        float64, (num_ffn_tensors, num_checkpoints).

    Raises:
        UpitError: a filter matches no FFN tensor, so that its value would never be used.
    """
    _check_idle_filters(architecture, [shared, *(own for own in per_model if own is not None)])
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameter

    spec = ParameterSpec("density", float, ParameterScope.NON_BASE, default=_DEFAULT)
    settings = [
        [{"density": _as_mergekit(own)}, {"density": _as_mergekit(shared)}]
        if own is not None
        else [{"density": _as_mergekit(shared)}]
        for own in per_model
    ]
    last = architecture.num_layers - 1
    return torch.tensor(
        [
            [
                # mergekit gives the single layer of a one-layer model the end of a gradient.
                resolve_parameter(spec, s, tensor_name=name, t=layer / last if last else 1.0)
                for s in settings
            ]
            for layer, _projection, name in architecture.ffn_names()
        ],
        dtype=torch.float64,
    )
