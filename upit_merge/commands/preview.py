"""The mixture a recipe's checkpoints would make, without writing it: to look before the work."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.merge.inputs import Inputs
from upit_merge.models.formats import PROJECTIONS, ffn_tensor
from upit_merge.models.mixture import mixture_config, mixture_specs
from upit_merge.router.assignment import sample_losses
from upit_merge.router.blends import DenseModels
from upit_merge.router.pretrain import computed_mixture
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage


class PlannedMixture:
    """The checkpoints as the experts of a mixture: their FFNs on the recipe's backbone.

    Children of the expansion are not among them: they are mixtures of what is.
    """

    label = "the planned model"

    def __init__(self, inputs: Inputs) -> None:
        architecture = inputs.architecture
        self._inputs, form, layers = inputs, architecture.format, architecture.mixture_layers
        last = len(inputs.checkpoints) - 1
        count = max(1 + last, form.fewest_experts)
        body, gates = mixture_specs(architecture, count, inputs.dtype)
        constants = form.constants(architecture.settings, count)
        self._constants = {constant.name: constant for constant in constants}
        self._backbone = {
            own: dense
            for dense in architecture.specs
            for own in form.outputs_of(dense, architecture.settings)
        }
        self._ffn = {
            form.expert_tensor(layer, expert, p): (min(expert, last), ffn_tensor(layer, p))
            for layer in layers
            for expert in range(count)
            for p in PROJECTIONS
        }
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in [*body, *gates]}
        self.config: Mapping[str, Any] = mixture_config(
            architecture,
            inputs.settings_donor,
            inputs.settings_donor,
            count,
            min(2, count),
            inputs.dtype,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Return what the run would write under this name; gates there are none."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the same."""
        dtype = self.specs[name].dtype
        if name in self._ffn:
            expert, dense = self._ffn[name]
            return self._inputs.checkpoints[expert].rows(dense, start, stop).to(dtype)
        if constant := self._constants.get(name):
            return torch.full((stop - start, *constant.shape[1:]), constant.value, dtype=dtype)
        dense = self._backbone[name]
        donors, factor = self._inputs.donors(dense), self._inputs.architecture.format.factor(dense)
        first, *others = (model.rows(dense, start, stop) for model in donors)
        if others:
            first = sum((t.float() for t in others), first.float()) / (1 + len(others))
        return (first if factor == 1 else first * factor).to(dtype)


@contextlib.contextmanager
def planned_stage(
    inputs: Inputs,
    seeds: SeedSet,
    settings: RouterSettings,
    device: torch.device,
    *,
    quiet: bool,
    quick: bool = False,
    label: str = "",
) -> Iterator[RouterStage]:
    """Open a stage that runs the planned mixture; see `checkpoint_losses`."""
    with tempfile.TemporaryDirectory() as scratch:
        model = computed_mixture(PlannedMixture(inputs), device, settings, quick=quick)
        seed, folder = inputs.recipe.seed, Path(scratch)
        yield RouterStage(model, seeds, settings, seed, folder, quiet=quiet, label=label)


def checkpoint_losses(
    inputs: Inputs,
    seeds: SeedSet,
    settings: RouterSettings,
    device: torch.device,
    *,
    quiet: bool,
    quick: bool = False,
    label: str = "",
) -> SampleLosses:
    """Compute every sample's loss under every checkpoint's FFN on the shared backbone.

    Args:
        label: Of the progress bar.
        quick: On the CPU, `compute: auto` means products in bfloat16, see `Arithmetic`.
    """
    with planned_stage(
        inputs, seeds, settings, device, quiet=quiet, quick=quick, label=label
    ) as stage:
        return sample_losses(stage)


def dense_models(inputs: Inputs) -> DenseModels:
    """Return what dense models can be made of: what the mixture is to be made of."""
    return DenseModels(
        inputs.base,
        inputs.checkpoints,
        (*inputs.backbone, *inputs.shared),
        inputs.architecture,
        inputs.dtype,
    )
