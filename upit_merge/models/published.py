"""Mixtures under the names of the published ones, whatever names their files have for the same.

transformers 5 keeps a layer's experts in two tensors and calls every mixture of experts `mlp`.
What is merged or saved by way of its state dict (mergekit 0.1.4 does both) has those names on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError, shown
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.safetensors_file import Place, SafetensorsFile
from upit_merge.io.tensor_file import StoredSpec, TensorSpec
from upit_merge.models.formats import (
    COUNT_FIELDS,
    FUSED,
    PROJECTIONS,
    MixtureFormat,
    found_format,
)

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,3})\.(.+)")
_EXPERT = re.compile(r"(.+)\.(0|[1-9]\d{0,3})\.(\w+)\.weight")

# A tensor in a stored one: its name, its shape, and its first row where that is a part.
_Part = tuple[str, tuple[int, ...], int | None]


class PublishedMixture(Checkpoint):
    """A mixture on disk, its tensors by their published names and one by one.

    Where all experts of a layer are in one tensor, (num_experts, 2 * intermediate_size,
    hidden_size) or (num_experts, hidden_size, intermediate_size), every matrix is a range of rows.

    Attributes:
        is_published: Its files have the published names, too, packed as these are.
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
        self._places: dict[str, Place] = {}
        self.is_published = True
        form = found_format(self.config)
        try:
            if form is not None:
                self._publish(form)
        except UpitError:
            self.close()
            raise

    def place_of(self, name: str) -> Place:
        """Return where in its file a tensor is."""
        place = self._places.get(name) or Place(name)
        return Place(self._stored[place.stored], place.first)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor in its stored dtype, on the CPU."""
        if name not in self._places:
            return super().rows(name, start, stop)
        place = self.place_of(name)
        file = self._owner[place.stored]
        assert isinstance(file, SafetensorsFile)  # `opened_mixture` opens no other
        return file.rows_at(place, start, stop)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, maybe in a larger one."""
        place = self._places.get(name)
        return super().file_of(place.stored if place else name)

    def _publish(self, form: MixtureFormat) -> None:
        names = _Names(form)
        specs: dict[str, TensorSpec] = {}
        self._check_fused(form, names)
        for stored, spec in self.specs.items():
            parts = names.parts(self.label, stored, spec.shape)
            for name, shape, first in parts or [(stored, spec.shape, None)]:
                if name in specs:
                    raise UpitError(
                        f"{self.label} has {name} twice, as {stored} and under another name; make "
                        "the model again."
                    )
                specs[name] = TensorSpec(name, shape, spec.dtype)
                if name != stored:
                    self._places[name] = Place(stored, first)
        published = {spec.name for spec in packed_specs(form, specs.values())}
        self.is_published = {*self._stored.values()} == published
        self.specs = specs

    def _check_fused(self, form: MixtureFormat, names: _Names) -> None:
        """Check fused tensors against the configuration, in the file's own words.

        Raises:
            UpitError: one has another shape, or is missing beside its like.
        """
        config = form.language_part(self.config)
        hidden, inner = (config.get(key) for key in ("hidden_size", form.inner_field))
        count = next((config[key] for key in COUNT_FIELDS if key in config), None)
        if not (isinstance(count, int) and isinstance(hidden, int) and isinstance(inner, int)):
            return  # told of when the configuration is read
        wanted = {"gate_up_proj": [count, 2 * inner, hidden], "down_proj": [count, hidden, inner]}
        for stored, spec in self.specs.items():
            layer, rest = names.place(stored)
            style = next((style for style in names.styles if rest in style), None)
            if layer is None or style is None:
                continue
            if [*spec.shape] != wanted[style[rest]]:
                raise UpitError(
                    f"{self.label} has {stored} of shape {shown([*spec.shape])}, its config.json "
                    f"says {wanted[style[rest]]}; make the model again."
                )
            before = stored.removesuffix(rest)
            gate = next((g for g in names.gates if before + g in self.specs), None)
            missing = [other for other in style if before + other not in self.specs]
            for other in missing or ([] if gate else [next(iter(names.gates))]):
                raise UpitError(
                    f"{self.label} has {stored}, but no {before}{other}; make the model again."
                )


class _Names:
    """What tensors of a format are called: as they are published, and in transformers' memory.

    Attributes:
        styles: Names within a layer of tensors that hold all its experts, and which of `FUSED`
            they are; one mapping for each way to call them.
        gates: Names within a layer of its gate.
    """

    def __init__(self, form: MixtureFormat) -> None:
        self._form = form
        paths = dict.fromkeys((form.experts_path, "mlp.experts", form.in_block("experts")))
        self.styles = [{f"{path}.{kind}": kind for kind in FUSED} for path in paths]
        self.styles.append({form.in_block(name): kind for name, kind in form.packed.items()})
        self._kinds = {name: kind for style in self.styles for name, kind in style.items()}
        self._paths = paths
        own = form.in_block(form.gate)
        inside = (f"{form.gate_path}.weight", "mlp.gate.weight", form.in_block("gate.weight"))
        self.gates = dict.fromkeys((*inside, own))

    def place(self, stored: str) -> tuple[int | None, str]:
        """Return the layer of a stored tensor, and its name there; None if it is in none."""
        match = _LAYER.fullmatch(self._form.plain_name(stored))
        return (int(match[1]), match[2]) if match else (None, "")

    def parts(self, label: str, stored: str, shape: tuple[int, ...]) -> list[_Part]:
        """Return the published tensors in a stored one; none where it is one, by its own name."""
        form, plain = self._form, self._form.plain_name(stored)
        layer, rest = self.place(stored)
        if layer is None:
            return [(plain, shape, None)] if plain != stored else []
        if rest in self.gates:
            return [(form.gate_tensor(layer), shape, None)]
        single = _EXPERT.fullmatch(rest)
        if single and single[1] in self._paths and single[3] in PROJECTIONS:
            return [(form.expert_tensor(layer, int(single[2]), single[3]), shape, None)]
        if rest not in self._kinds:
            return [(plain, shape, None)] if plain != stored else []
        kinds = FUSED[self._kinds[rest]]
        fits = len(shape) == 3 and not shape[1] % len(kinds) and math.prod(shape) > 0
        # As many experts as a matrix has elements: names must not outgrow the file.
        if not fits or shape[0] > shape[1] * shape[2]:
            raise UpitError(
                f"{label} has {stored} of shape {shown(list(shape))}, which are not the matrices "
                "of experts; make the model again."
            )
        experts, rows, columns = shape
        rows //= len(kinds)
        return [
            (
                form.expert_tensor(layer, expert, kind),
                (rows, columns),
                (expert * len(kinds) + index) * rows,
            )
            for expert in range(experts)
            for index, kind in enumerate(kinds)
        ]


def packed_specs(form: MixtureFormat, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return a mixture's tensors as its published files have them, in order of their first part.

    Args:
        specs: Of its tensors one by one, of every packed one all parts.
    """
    kinds = {form.projections[p]: name for name, k in form.packed.items() for p in FUSED[k]}
    stored: dict[str, list[tuple[tuple[int, int], TensorSpec]]] = {}
    for spec in specs:
        match = form.expert_pattern.fullmatch(spec.name) if kinds else None
        if match is None:
            stored[form.stored_name(spec.name)] = [((0, 0), spec)]
            continue
        packed = kinds[match["kind"]]
        order = [form.projections[p] for p in FUSED[form.packed[packed]]]
        within = form.layer_prefix(int(match["layer"])) + form.in_block(packed)
        place = int(match["expert"]), order.index(match["kind"])
        stored.setdefault(form.stored_name(within), []).append((place, spec))
    return [_stored_spec(name, sorted(parts, key=lambda p: p[0])) for name, parts in stored.items()]


def _stored_spec(name: str, parts: Sequence[tuple[tuple[int, int], TensorSpec]]) -> TensorSpec:
    specs = tuple(spec for _place, spec in parts)
    if len(specs) == 1:
        return (
            specs[0]
            if specs[0].name == name
            else StoredSpec(name, specs[0].shape, specs[0].dtype, specs)
        )
    experts = 1 + max(expert for (expert, _index), _spec in parts)
    rows, columns = specs[0].shape
    shape = (experts, len(specs) // experts * rows, columns)
    return StoredSpec(name, shape, specs[0].dtype, specs)


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
    published, names = {}, _Names(form)
    for stored, tensor in tensors.items():
        parts = names.parts(label, stored, tuple(tensor.shape))
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
    complete = dict(form.language_part(config))
    rope = complete.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        complete.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            complete.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            complete["rope_scaling"] = complete.get("rope_scaling") or scaling
    if isinstance(complete.get("dtype"), str):
        complete.setdefault("torch_dtype", complete["dtype"])
    counts = [complete[key] for key in COUNT_FIELDS if key in complete]
    if counts:
        complete.setdefault(form.count_field, counts[0])
    for key, value in form.wanted_fields(complete).items():
        complete.setdefault(key, value)
    return form.with_language_part(config, complete)
