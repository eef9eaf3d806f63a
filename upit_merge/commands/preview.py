"""The mixture a recipe's checkpoints would make, without writing it: to look before the work."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.merge.inputs import Inputs
from upit_merge.models.unwritten import UnwrittenMixture
from upit_merge.router.assignment import sample_losses
from upit_merge.router.blends import DenseModels
from upit_merge.router.pretrain import computed_mixture
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage


class PlannedMixture(UnwrittenMixture):
    """The checkpoints as the experts of a mixture: their FFNs on the recipe's backbone.

    Children of the expansion are not among them: they are mixtures of what is.
    """

    label = "the planned model"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        count, donor = len(inputs.checkpoints), inputs.settings_donor
        super().__init__(inputs.architecture, donor, count, inputs.dtype)

    def _expert_rows(self, expert: int, dense: str, start: int, stop: int) -> torch.Tensor:
        return self._inputs.checkpoints[expert].rows(dense, start, stop)

    def _backbone_rows(self, dense: str, start: int, stop: int) -> torch.Tensor:
        donors = self._inputs.donors(dense)
        first, *others = (model.rows(dense, start, stop) for model in donors)
        if not others:
            return first
        return sum((t.float() for t in others), first.float()) / (1 + len(others))


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
