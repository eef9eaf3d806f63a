"""Mixtures with more or fewer experts than one that is there, before they are written.

What a router has one value of for every expert, beside its gate (a bias that only decides who is
chosen, a factor of what the expert gives), goes with the experts, for training may have moved it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec, all_finite, row_blocks
from upit_merge.models.formats import COUNT_FIELDS, PROJECTIONS, ffn_tensor
from upit_merge.models.mixture import MixtureArchitecture
from upit_merge.models.published import complete_config

_BLOCK_ELEMENTS = 1 << 18


class ResizedMixture:
    """A mixture with another number of experts; what is not of these is the model's own.

    Args:
        moe: The model.
        architecture: What it is.
        num_experts: How many there are to be.
    """

    def __init__(
        self, moe: Checkpoint, architecture: MixtureArchitecture, num_experts: int
    ) -> None:
        form = architecture.format
        self._moe = moe
        self.architecture = architecture
        self._layers = architecture.mixture_layers
        dtype = moe.specs[form.expert_tensor(self._layers[0], 0, PROJECTIONS[0])].dtype
        self._form = form
        self.label = moe.label
        # transformers 5 takes, and writes, other spellings than the published ones.
        fields = form.language_part(moe.config)
        spelled = [key for key in COUNT_FIELDS if key in fields] or [form.count_field]
        config = {**fields, **dict.fromkeys(spelled, num_experts)}
        self.config = complete_config(form.with_language_part(moe.config, config), form)
        # Of the model itself a tensor keeps its dtype: some keep norms or gates in float32.
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(name, shape, moe.specs[name].dtype if name in moe.specs else dtype)
            for name, shape in architecture.shapes(num_experts)
        }
        # What routers have of every expert, beside the gates, and in which mixture.
        beside = {*architecture.of_gates()} - {*architecture.gate_names()}
        self._mixture_of = {
            name: number
            for number, layer in enumerate(self._layers)
            for name in beside
            if name.startswith(form.layer_prefix(layer))
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU."""
        if name in self._mixture_of:
            return self._by_experts(name)[start:stop]
        return self._moe.rows(name, start, stop)

    def _by_experts(self, name: str) -> Tensor:
        """Return a tensor along one axis of which the experts are, whichever that is."""
        values = self._moe.tensor(name)
        shapes = zip(self._moe.specs[name].shape, self.specs[name].shape, strict=True)
        axis = next((axis for axis, (old, new) in enumerate(shapes) if old != new), None)
        if axis is None:
            return values
        return self._of_experts(name, values.movedim(axis, 0)).movedim(0, axis).contiguous()

    def _of_experts(self, name: str, values: Tensor) -> Tensor:
        """Return what the experts that there are to be have of a tensor, in its dtype.

        Args:
            values: What the old ones have, (num_experts, …).
        """
        raise NotImplementedError

    def _mean(self, name: str, values: Tensor, shares: Sequence[float]) -> Tensor:
        """Return the mean over the first axis, in the dtype: of equal values these, to the bit.

        Raises:
            UpitError: there is none.
        """
        if not all_finite(values):
            raise UpitError(
                f"{self.label} has NaN or infinite values in {name}, of which there is no mean; use "
                "a mixture from before its training diverged."
            )
        differences = values.double() - values[0].double()
        weights = torch.tensor(shares, dtype=torch.float64)
        return (values[0].double() + torch.tensordot(weights, differences, 1)).to(values.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor in its dtype, on the CPU."""
        return self.rows(name, 0, self.specs[name].shape[0])


class ExtendedMixture(ResizedMixture):
    """A mixture with the FFN of a dense model as one more expert, the last.

    Of its gates only the shape is known. Of what else its routers have of every expert, the new one
    has the mean of the others'. A bias counts by how far it is from those of the others; and what
    experts give is added up, so that with the mean factor the new one adds as much as they do.
    """

    def __init__(
        self, moe: Checkpoint, architecture: MixtureArchitecture, dense: DenseModel
    ) -> None:
        super().__init__(moe, architecture, architecture.num_experts + 1)
        self.expert = architecture.num_experts
        self._dense = dense
        self._places = {
            self._form.expert_tensor(layer, self.expert, p): (layer, p)
            for layer in self._layers
            for p in PROJECTIONS
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU.

        Raises:
            UpitError: values of the new expert are NaN or infinite, or overflow its dtype.
        """
        if name not in self._places:
            return super().rows(name, start, stop)
        dense = ffn_tensor(*self._places[name])
        values = self._dense.rows(dense, start, stop).to(self.specs[name].dtype)
        if not all_finite(values):
            raise UpitError(
                f"Checkpoint {self._dense.label} has NaN or infinite weights in {dense}, or they "
                f"overflow {self.label}'s dtype; use another checkpoint."
            )
        return values

    def _of_experts(self, name: str, values: Tensor) -> Tensor:
        new = self._mean(name, values, [1 / len(values)] * len(values))
        return torch.cat([values, new.unsqueeze(0)])

    def twin(self) -> int | None:
        """Return which expert that is there has the new one's very values; None if none has."""
        alike = [*range(self.expert)]
        for name, (layer, projection) in self._places.items():
            spec, dense = self.specs[name], ffn_tensor(layer, projection)
            peers = [self._form.expert_tensor(layer, expert, projection) for expert in alike]
            for start, stop in row_blocks(spec, _BLOCK_ELEMENTS):
                rows = self._dense.rows(dense, start, stop).to(spec.dtype)
                same = [torch.equal(rows, self._moe.rows(peer, start, stop)) for peer in peers]
                alike = [expert for expert, is_same in zip(alike, same, strict=True) if is_same]
                peers = [peer for peer, is_same in zip(peers, same, strict=True) if is_same]
                if not alike:
                    return None
        return alike[0]


@dataclass(frozen=True)
class Group:
    """Experts of one layer that become one.

    Attributes:
        members: Their numbers, the dominant one first.
        shares: Of each member in the mean; they sum to 1.
    """

    members: tuple[int, ...]
    shares: tuple[float, ...]


# One expert after the other, for every layer.
Groups = Sequence[Sequence[Group]]


class ShrunkMixture(ResizedMixture):
    """A mixture whose experts are means of groups of another's; groups of one are untouched.

    So is whatever else a router has one of for every expert.

    Args:
        groups: By mixture; of each as many.
        gates: By mixture, float32, (num_groups, hidden_size).
    """

    def __init__(
        self,
        moe: Checkpoint,
        architecture: MixtureArchitecture,
        groups: Groups,
        gates: Sequence[Tensor],
    ) -> None:
        super().__init__(moe, architecture, len(groups[0]))
        form = self._form
        self._groups = groups
        self._gates = dict(zip(architecture.gate_names(), gates, strict=True))
        self._parts = {
            form.expert_tensor(layer, index, p): [
                (form.expert_tensor(layer, member, p), share)
                for member, share in zip(group.members, group.shares, strict=True)
            ]
            for layer, row in zip(self._layers, groups, strict=True)
            for index, group in enumerate(row)
            for p in PROJECTIONS
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU."""
        if name in self._gates:
            return self._gates[name][start:stop].to(self.specs[name].dtype)
        parts = self._parts.get(name)
        if parts is None:
            return super().rows(name, start, stop)
        if len(parts) == 1:
            return super().rows(parts[0][0], start, stop)
        total: Tensor = torch.zeros(())
        for member, share in parts:
            total = total + self._moe.rows(member, start, stop).float() * share
        return total.to(self.specs[name].dtype)

    def _of_experts(self, name: str, values: Tensor) -> Tensor:
        means = [
            values[group.members[0]]
            if len(group.members) == 1
            else self._mean(name, values[list(group.members)], group.shares)
            for group in self._groups[self._mixture_of[name]]
        ]
        return torch.stack(means)


class PrunedMixture(ResizedMixture):
    """A mixture without some of another's experts; those that are left keep every byte.

    So do their routing vectors, and whatever else a gate has one of for every expert.

    Args:
        kept: The numbers of those that stay, by mixture; of each as many.
    """

    def __init__(
        self, moe: Checkpoint, architecture: MixtureArchitecture, kept: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(moe, architecture, len(kept[0]))
        form = self._form
        self._kept = [torch.tensor(row) for row in kept]
        # Gates are nothing else here than what else there is of every expert.
        self._mixture_of |= {name: n for n, name in enumerate(architecture.gate_names())}
        self._old = {
            form.expert_tensor(layer, index, p): form.expert_tensor(layer, number, p)
            for layer, row in zip(self._layers, kept, strict=True)
            for index, number in enumerate(row)
            for p in PROJECTIONS
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU."""
        return super().rows(self._old.get(name, name), start, stop)

    def _of_experts(self, name: str, values: Tensor) -> Tensor:
        return values.index_select(0, self._kept[self._mixture_of[name]])
