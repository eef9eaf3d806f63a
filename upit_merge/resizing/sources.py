"""Mixtures with more or fewer experts than one that is there, before they are written."""

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
    """A mixture with another number of experts; what is not an expert is the model's own.

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
        constants = form.constants(architecture.dense_settings(), num_experts)
        self._constants = {
            constant.name: constant
            for constant in constants
            if constant.name not in moe.specs or moe.specs[constant.name].shape != constant.shape
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU."""
        if constant := self._constants.get(name):
            shape = (stop - start, *constant.shape[1:])
            return torch.full(shape, constant.value, dtype=self.specs[name].dtype)
        return self._moe.rows(name, start, stop)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor in its dtype, on the CPU."""
        return self.rows(name, 0, self.specs[name].shape[0])


class ExtendedMixture(ResizedMixture):
    """A mixture with the FFN of a dense model as one more expert, the last.

    Of its gates only the shape is known.
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
        form, gates = self._form, architecture.of_gates()
        self._old = {
            form.expert_tensor(layer, index, p): form.expert_tensor(layer, number, p)
            for layer, row in zip(self._layers, kept, strict=True)
            for index, number in enumerate(row)
            for p in PROJECTIONS
        }
        self._gates = {
            name: torch.tensor(row)
            for layer, row in zip(self._layers, kept, strict=True)
            for name in gates
            if name.startswith(form.layer_prefix(layer))
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, in its dtype, on the CPU."""
        if name in self._gates:
            shapes = zip(self._moe.specs[name].shape, self.specs[name].shape, strict=True)
            axis = next(axis for axis, (old, new) in enumerate(shapes) if old != new)
            return self._moe.tensor(name).index_select(axis, self._gates[name])[start:stop]
        return super().rows(self._old.get(name, name), start, stop)
