"""The fit that a recipe's `router:` block asks for."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.router import objectives
from upit_merge.router.clustering import kmeans
from upit_merge.router.objectives import GateData, Objective


def objective_of(settings: RouterSettings, seed: int) -> Objective:
    """Return what fits a gate, scaled by the temperature.

    Args:
        seed: Of whatever is random.
    """
    fit = _unscaled(settings, seed)

    def scaled(data: GateData) -> Tensor:
        return objectives.normalise(fit(data), data, settings.scale)

    return scaled


def _unscaled(settings: RouterSettings, seed: int) -> Objective:
    if settings.objective == "upit":
        upit = settings.upit_settings
        return partial(
            objectives.upit,
            alpha=float(upit.alpha),
            epochs=upit.epochs,
            lr=upit.learning_rate,
            batch_size=upit.batch_size,
            seed=seed,
        )
    if settings.objective == "kmeans":
        return partial(kmeans, seed=seed)
    return objectives.BY_NAME[settings.objective]
