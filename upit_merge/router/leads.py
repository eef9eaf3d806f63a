"""Biases that only decide who is chosen, beside the gates: what they mean for gates that are fitted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.router.objectives import ToBeat

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Biases:
    """What a router adds to the experts' scores before it chooses.

    Attributes:
        name: What it is called.
        values: float32, (num_experts,) by mixture.
    """

    name: str
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: LayerwiseMixture) -> Biases | None:
        """Return those of a mixture; None if they favour nobody, as where it has none."""
        form = model.format
        if form.choice_bias is None:
            return None
        names = [
            f"{form.layer_prefix(layer)}{form.in_block(form.choice_bias)}"
            for layer in model.mixture_layers
        ]
        values = tuple(model.moe.tensor(name).float().flatten() for name in names)
        biases = cls(form.choice_bias.rpartition(".")[2], values)
        return biases if biases.span else None

    @property
    def span(self) -> float:
        """By how much two experts of a layer differ at most."""
        return max(float(row.max() - row.min()) for row in self.values)

    @property
    def leads(self) -> list[Tensor]:
        """What every expert but the last has more than that one, (num_experts - 1,) by mixture."""
        return [row[:-1] - row[-1] for row in self.values]


def to_beat(model: LayerwiseMixture) -> ToBeat | None:
    """Return what tells the logits that the last expert needs to be chosen before each other one.

    Returns:
        Of the number of a mixture and the others' logits, (tokens, num_experts - 1); None if these
        are what it needs.
    """
    biases = Biases.of(model)
    if biases is None:
        return None
    leads = biases.leads
    return lambda mixture, logits: model.format.to_beat(logits, leads[mixture].to(logits.device))


def warn_of_biases(model: LayerwiseMixture) -> None:
    """Say so where the router has biases that gates know nothing of which are fitted anew."""
    if biases := Biases.of(model):
        LOG.warning(
            "The router of %s adds a bias to what its gates say of each expert (%s, which differ by "
            "up to %s), which no fit takes into account: it still shifts who is chosen; add "
            "--refine-steps to `upit-merge router`, which trains the gates with it.",
            model.moe.label,
            biases.name,
            f"{biases.span:.2g}",
        )
