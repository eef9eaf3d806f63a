"""Mixtures that are computed as they are read, and never written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.dense import DenseArchitecture
from upit_merge.models.formats import PROJECTIONS, ffn_tensor
from upit_merge.models.mixture import mixture_config, mixture_specs


class UnwrittenMixture(ABC):
    """A mixture as a merge would write it, a `TensorSource`; gates there are none.

    Args:
        architecture: Of the mixture.
        donor: Has the settings.
        experts: How many different ones there are; a format that wants more gets the last again.
        dtype: Of the tensors.
    """

    label: ClassVar[str]

    def __init__(
        self, architecture: DenseArchitecture, donor: DenseModel, experts: int, dtype: torch.dtype
    ) -> None:
        form = architecture.format
        count = max(experts, form.fewest_experts)
        body, gates = mixture_specs(architecture, count, dtype)
        constants = form.constants(architecture.settings, count)
        self._constants = {constant.name: constant for constant in constants}
        self._factor = form.factor
        self._backbone = {
            own: dense
            for dense in architecture.specs
            for own in form.outputs_of(dense, architecture.settings)
        }
        self._ffn = {
            form.expert_tensor(layer, expert, p): (min(expert, experts - 1), ffn_tensor(layer, p))
            for layer in architecture.mixture_layers
            for expert in range(count)
            for p in PROJECTIONS
        }
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in [*body, *gates]}
        self.config: Mapping[str, Any] = mixture_config(
            architecture, donor, donor, count, min(2, count), dtype
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Return what a merge would write under this name."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the same."""
        dtype = self.specs[name].dtype
        if name in self._ffn:
            return self._expert_rows(*self._ffn[name], start, stop).to(dtype)
        if constant := self._constants.get(name):
            return torch.full((stop - start, *constant.shape[1:]), constant.value, dtype=dtype)
        dense = self._backbone[name]
        rows, factor = self._backbone_rows(dense, start, stop), self._factor(dense)
        return (rows if factor == 1 else rows * factor).to(dtype)

    @abstractmethod
    def _expert_rows(self, expert: int, dense: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of an expert's tensor, by its name in a dense model; in any dtype."""

    @abstractmethod
    def _backbone_rows(self, dense: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor that all experts share, in any dtype."""
