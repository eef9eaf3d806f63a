"""Mixtures under the names of the published ones, whatever names their files have for the same.

transformers 5 keeps a layer's experts in two tensors and calls every mixture of experts `mlp`.
What is merged or saved by way of its state dict (mergekit 0.1.4 does both) has those names on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError, shown
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.formats import COUNT_FIELDS, FORMATS, PROJECTIONS, MixtureFormat

_PLACE = r"model\.layers\.(?P<layer>0|[1-9]\d{0,3})\.(?:mlp|block_sparse_moe)\."
_FUSED = re.compile(_PLACE + r"experts\.(?P<kind>gate_up_proj|down_proj)")
_SINGLE = re.compile(
    _PLACE + rf"experts\.(?P<expert>0|[1-9]\d{{0,3}})\.(?P<kind>{'|'.join(PROJECTIONS)})\.weight"
)
_GATE = re.compile(_PLACE + r"gate\.weight")


@dataclass(frozen=True)
class _Slice:
    """Where a tensor is: all of a stored one, or rows of it as a matrix, from `first` on."""

    stored: str
    first: int | None = None


class PublishedMixture(Checkpoint):
    """A mixture on disk, its tensors by their published names and in their published shapes.

    Of fused experts, `gate_up_proj` (num_experts, 2 * intermediate_size, hidden_size) and
    `down_proj` (num_experts, hidden_size, intermediate_size), every matrix is a range of rows.
    """

    def __init__(
        self,
        label: str,
        folder: Path,
        options: OpenOptions,
        *,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(label, folder, options, config=config)
        self._slices: dict[str, _Slice] = {}
        form = FORMATS.get(str(self.config.get("model_type")))
        try:
            if form is not None:
                self._publish(form)
        except UpitError:
            self.close()
            raise

    @property
    def is_published(self) -> bool:
        """Whether its files have these names, too."""
        return not self._slices and all(name == stored for name, stored in self._stored.items())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor in its stored dtype, on the CPU."""
        part = self._slices.get(name)
        if part is None:
            return super().rows(name, start, stop)
        if part.first is None:
            return super().rows(part.stored, start, stop)
        stored = self._stored[part.stored]
        file = self._owner[stored]
        assert isinstance(file, SafetensorsFile)  # `opened_mixture` opens no other
        return file.matrix_rows(stored, part.first + start, part.first + stop)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, maybe in a larger one."""
        part = self._slices.get(name)
        return super().file_of(part.stored if part else name)

    def _publish(self, form: MixtureFormat) -> None:
        specs: dict[str, TensorSpec] = {}
        self._check_fused(form)
        for stored, spec in self.specs.items():
            parts = _parts(form, self.label, stored, spec.shape)
            for name, shape, first in parts or [(stored, spec.shape, None)]:
                if name in specs:
                    raise UpitError(
                        f"{self.label} has {name} twice, as {stored} and under another name; make "
                        "the model again."
                    )
                specs[name] = TensorSpec(name, shape, spec.dtype)
                if name != stored:
                    self._slices[name] = _Slice(stored, first)
        self.specs = specs

    def _check_fused(self, form: MixtureFormat) -> None:
        """Check fused tensors against the configuration, in the file's own words.

        Raises:
            UpitError: one has another shape, or is missing beside its like.
        """
        hidden, inner = (self.config.get(key) for key in ("hidden_size", form.inner_field))
        count = next((self.config[key] for key in COUNT_FIELDS if key in self.config), None)
        if not (isinstance(count, int) and isinstance(hidden, int) and isinstance(inner, int)):
            return  # told of when the configuration is read
        wanted = {"gate_up_proj": [count, 2 * inner, hidden], "down_proj": [count, hidden, inner]}
        fused = [match for name in self.specs if (match := _FUSED.fullmatch(name))]
        for match in fused:
            found = [*self.specs[match[0]].shape]
            if found != wanted[match["kind"]]:
                raise UpitError(
                    f"{self.label} has {match[0]} of shape {shown(found)}, its config.json says "
                    f"{wanted[match['kind']]}; make the model again."
                )
            before = match[0].removesuffix(f"experts.{match['kind']}")
            gates = f"{before}gate.weight", form.gate_tensor(int(match["layer"]))
            gate = next((name for name in gates if name in self.specs), gates[0])
            for other in (*(f"{before}experts.{kind}" for kind in wanted), gate):
                if other not in self.specs:
                    raise UpitError(
                        f"{self.label} has {match[0]}, but no {other}; make the model again."
                    )


def _parts(
    form: MixtureFormat, label: str, stored: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...], int | None]]:
    """Return the published tensors in a stored one: name, shape, and first row if it is fused."""
    if match := _GATE.fullmatch(stored):
        return [(form.gate_tensor(int(match["layer"])), shape, None)]
    if match := _SINGLE.fullmatch(stored):
        place = int(match["layer"]), int(match["expert"]), match["kind"]
        return [(form.expert_tensor(*place), shape, None)]
    match = _FUSED.fullmatch(stored)
    if match is None:
        return []
    kinds = ("gate_proj", "up_proj") if match["kind"] == "gate_up_proj" else ("down_proj",)
    fits = len(shape) == 3 and not shape[1] % len(kinds) and math.prod(shape) > 0
    # As many experts as a matrix has elements: names must not outgrow the file.
    if not fits or shape[0] > shape[1] * shape[2]:
        raise UpitError(
            f"{label} has {stored} of shape {shown(list(shape))}, which are not the matrices of "
            "experts; make the model again."
        )
    experts, rows, columns = shape
    rows //= len(kinds)
    return [
        (
            form.expert_tensor(int(match["layer"]), expert, kind),
            (rows, columns),
            (expert * len(kinds) + index) * rows,
        )
        for expert in range(experts)
        for index, kind in enumerate(kinds)
    ]


def published_tensors(
    form: MixtureFormat, label: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a mixture's tensors by their published names, views of those that are fused.

    Args:
        label: What the mixture is called in messages.
        tensors: By the names that they have in transformers' memory, or in files.

    Raises:
        UpitError: one of them cannot be what it is called.
    """
    published = {}
    for stored, tensor in tensors.items():
        parts = _parts(form, label, stored, tuple(tensor.shape))
        for name, shape, first in parts or [(stored, tuple(tensor.shape), None)]:
            if first is None:
                published[name] = tensor
            else:
                published[name] = tensor.flatten(0, 1)[first : first + shape[0]]
    return published


def complete_config(config: Mapping[str, Any], form: MixtureFormat) -> dict[str, Any]:
    """Return a mixture's `config.json` with what other readers look for in it.

    transformers 5 writes rope settings, dtype and the number of experts under names that only it
    reads; transformers 4.57.6 then takes its own defaults, without a word.
    """
    complete = dict(config)
    rope = complete.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        complete.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            complete["rope_scaling"] = complete.get("rope_scaling") or scaling
    if isinstance(complete.get("dtype"), str):
        complete.setdefault("torch_dtype", complete["dtype"])
    counts = [complete[key] for key in COUNT_FIELDS if key in complete]
    if counts:
        complete.setdefault(form.count_field, counts[0])
    for key in form.required:
        complete.setdefault(key, form.own_fields(complete, 0)[key])
    return complete
