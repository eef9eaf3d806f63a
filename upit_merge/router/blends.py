"""Dense models that are weighted sums of others, computed as they are read and never written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from upit_merge.io.same import have_same_tensors
from upit_merge.io.sources import DenseModel
from upit_merge.models.dense import DenseArchitecture, dense_settings
from upit_merge.models.unwritten import UnwrittenMixture
from upit_merge.models.views import View

# Of the base, then of the checkpoints.
Weights = tuple[float, ...]


@dataclass(frozen=True)
class DenseModels:
    """What dense models can be made of, as they are opened for a merge.

    Attributes:
        base, checkpoints: As Llamas, cut as the mixture's architecture wants them.
        around: The models that the rest of the mixture, beside its experts, comes from.
        mixture: What they become.
        dtype: Of what is made.
    """

    base: DenseModel
    checkpoints: Sequence[DenseModel]
    around: Sequence[DenseModel]
    mixture: DenseArchitecture
    dtype: torch.dtype

    @cached_property
    def whole(self) -> list[DenseModel]:
        """The base and the checkpoints with whole FFNs."""
        return [self._uncut(model) for model in (self.base, *self.checkpoints)]

    def _uncut(self, model: DenseModel) -> DenseModel:
        if self.mixture.settings["shared"] != "split":
            return model
        assert isinstance(model, View)
        return model.seen

    @cached_property
    def architecture(self) -> DenseArchitecture:
        """That of a mixture which computes what a checkpoint computes: nothing beside experts."""
        form, last = self.mixture.format, self.whole[-1]
        shared = next(kind for kind in form.shared if kind != "split")
        settings = {**dense_settings(last), "shared": shared, "dense_layers": 0}
        specs = {name: last.specs[name] for name, _shape in form.dense_shapes(settings)}
        return DenseArchitecture(form, settings, specs)

    @cached_property
    def ffn(self) -> frozenset[str]:
        """Names of the tensors that become experts."""
        return frozenset(name for _layer, _projection, name in self.architecture.ffn_names())

    def fit(self, models: Sequence[DenseModel]) -> bool:
        """Return whether some models have all tensors in the same shapes."""
        return all(
            name in model.specs and model.specs[name].shape == spec.shape
            for model in models
            for name, spec in self.architecture.specs.items()
        )

    @cached_property
    def num_bytes(self) -> int:
        """What a dense model takes on disk."""
        return sum(spec.numel for spec in self.architecture.specs.values()) * self.dtype.itemsize

    @cached_property
    def one_mixture(self) -> bool:
        """Whether every checkpoint is one of the mixture's experts amid what it has around them."""
        if self.mixture.settings["dense_layers"]:  # whose FFNs become no experts
            return False
        return self._same_around([*self.whole[1:], *(self._uncut(m) for m in self.around)])

    @cached_property
    def one_backbone(self) -> bool:
        """Whether the base, too, is the same but for what becomes experts."""
        return self.one_mixture and self._same_around(self.whole[:2])

    def _same_around(self, models: Sequence[DenseModel]) -> bool:
        """Return whether models are the same but for what becomes experts."""
        first, *others = {id(model): model for model in models}.values()
        names = self.architecture.specs.keys() - self.ffn
        return self.fit([first, *others]) and have_same_tensors(first, others, names)

    # ---- weights ---------------------------------------------------------------------------

    def single(self, checkpoint: int) -> Weights:
        """One checkpoint as it is."""
        return tuple(float(i == checkpoint + 1) for i in range(len(self.whole)))

    def summed(self, scale: float) -> Weights:
        """Base + scale · Σ (checkpoint - base); with scale 1 / num_checkpoints, the average."""
        count = len(self.checkpoints)
        return (1 - scale * count, *[scale] * count)

    @property
    def average(self) -> Weights:
        """The mean of the checkpoints."""
        count = len(self.checkpoints)
        return (0.0, *[1 / count] * count)


class BlendedModels(UnwrittenMixture):
    """Some dense models as the experts of one mixture.

    Args:
        models: What they are made of.
        blends: The weights of each. Of several, the backbone is the last checkpoint's own: where
            not all backbones are the same, there must be one blend.
    """

    label = "a sum of the checkpoints"

    def __init__(self, models: DenseModels, blends: Sequence[Weights]) -> None:
        self._models, self._blends = models, blends
        self._around = models.single(len(models.checkpoints) - 1) if len(blends) > 1 else blends[0]
        super().__init__(models.architecture, models.whole[-1], len(blends), models.dtype)

    def _expert_rows(self, expert: int, dense: str, start: int, stop: int) -> torch.Tensor:
        return self._blended(self._blends[expert], dense, start, stop)

    def _backbone_rows(self, dense: str, start: int, stop: int) -> torch.Tensor:
        return self._blended(self._around, dense, start, stop)

    def _blended(self, weights: Weights, dense: str, start: int, stop: int) -> torch.Tensor:
        """Return the sum in float32; a single model's rows as they are stored."""
        used = [(w, m) for w, m in zip(weights, self._models.whole, strict=True) if w]
        if len(used) == 1 and used[0][0] == 1:
            return used[0][1].rows(dense, start, stop)
        total: torch.Tensor | None = None
        for weight, model in used:
            part = model.rows(dense, start, stop).float() * weight
            total = part if total is None else total.add_(part)
        assert total is not None
        return total
