"""One expert of a mixture, or the mean of several, as a dense model: names, settings, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.tensor_file import StoredSpec, TensorSpec, row_blocks
from upit_merge.models.dense import carried_settings
from upit_merge.models.families import FAMILIES, DenseFamily
from upit_merge.models.formats import (
    PLAIN,
    PROJECTIONS,
    Constant,
    ffn_tensor,
    shared_tensor,
)
from upit_merge.models.mixture import MixtureArchitecture

_BLOCK_ELEMENTS = 1 << 20
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Rows [start, stop) of a matrix, and how many neurons it is of: rows, or columns of a `down_proj`.
_Part = tuple[Callable[[int, int], Tensor], int]


class ExtractedModel:
    """The dense model that computes what a mixture does if every token goes through one expert.

    That is the backbone, with the expert's FFN; beside what a shared expert adds, whose neurons
    are put before the expert's. What is narrower than the widest layer is filled up with zeros.

    Args:
        moe: The mixture.
        architecture: What it is.
        experts: Whose mean it is, of one or several.

    Raises:
        UpitError: no dense model computes that.
    """

    def __init__(
        self, moe: Checkpoint, architecture: MixtureArchitecture, experts: Sequence[int]
    ) -> None:
        form, settings = architecture.format, architecture.dense_settings()
        self._moe, self._form, self._experts = moe, form, tuple(experts)
        self._architecture = architecture
        self.num_experts = architecture.num_experts
        if reason := form.unfit_dense(settings, architecture.config):
            raise UpitError(f"{moe.label} {reason}; its experts cannot be extracted.")
        self.family: DenseFamily = FAMILIES[form.dense_type_of(settings)]
        self._dense_size = int(settings["intermediate_size"])  # of layers that are no mixtures
        self._shared_size = self._size_of_shared(settings)
        widths = [architecture.intermediate_size + self._shared_size]
        if settings["dense_layers"]:
            widths.append(self._dense_size)
        self.settings = {**settings, **PLAIN, "intermediate_size": max(widths)}
        self._ffn = {
            ffn_tensor(layer, p): (layer, p)
            for layer in range(architecture.num_layers)
            for p in PROJECTIONS
        }
        self.specs = {
            name: TensorSpec(name, shape, moe.specs[self._source(name)].dtype)
            for name, shape in form.dense_shapes(self.settings)
        }

    def _source(self, name: str) -> str:
        """Return what the mixture calls a tensor, or the first that one is made of."""
        layer, projection = self._ffn.get(name, (None, ""))
        if layer is not None and layer in self._architecture.mixture_layers:
            return self._form.expert_tensor(layer, self._experts[0], projection)
        # Where two are copies, the last is that which experts see.
        return self._form.backbone_names(name)[-1]

    def _shared_name(self, layer: int, projection: str) -> str:
        return self._form.backbone_names(shared_tensor(layer, projection))[0]

    # ---- what is not an expert's -------------------------------------------------------------

    def _size_of_shared(self, settings: Mapping[str, Any]) -> int:
        """Return how many neurons of a shared expert count; checks all else that has constants.

        Raises:
            UpitError: one of them has other values, so that it counts.
        """
        form, layers = self._form, self._architecture.mixture_layers
        shared = {self._shared_name(layer, p) for layer in layers for p in PROJECTIONS}
        counts = settings["shared"] == "split"
        for constant in self._constants(settings):
            if self._is_constant(constant):
                continue
            if constant.name not in shared:
                title = FAMILIES[form.dense_type_of(settings)].title
                raise UpitError(
                    f"{self._moe.label} has {constant.name} of other values than "
                    f"{constant.value:g}, which no dense {title} can express; its experts cannot "
                    "be extracted."
                )
            counts = True
        return self._moe.specs[self._shared_name(layers[0], "up_proj")].shape[0] if counts else 0

    def _constants(self, settings: Mapping[str, Any]) -> Iterator[Constant]:
        """Yield what a mixture has beside a dense model, but for what is of its routers."""
        form, own = self._form, {*self._architecture.of_gates()}
        router = form.in_block(form.gate.split(".")[0])
        routers = tuple(
            f"{form.layer_prefix(layer)}{router}." for layer in self._architecture.mixture_layers
        )
        for constant in form.constants(settings, self._architecture.num_experts):
            if constant.name not in own and not constant.name.startswith(routers):
                yield constant

    def _is_constant(self, constant: Constant) -> bool:
        spec = self._moe.specs[constant.name]
        value = torch.tensor(constant.value, dtype=spec.dtype)
        blocks = row_blocks(spec, _BLOCK_ELEMENTS)
        return all(bool((self._moe.rows(spec.name, *block) == value).all()) for block in blocks)

    # ---- tensors -----------------------------------------------------------------------------

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor by its dense name, on the CPU."""
        if name not in self._ffn:
            return self._moe.rows(self._source(name), start, stop)
        parts = [*self._parts(*self._ffn[name])]
        if name.endswith("down_proj.weight"):
            found = [rows(start, stop) for rows, _size in parts]
            width = self.specs[name].shape[1] - sum(size for _rows, size in parts)
            if width:
                found.append(found[0].new_zeros(stop - start, width))
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)
        found, first = [], 0
        for rows, size in parts:
            last = first + size
            if start < last and stop > first:
                found.append(rows(max(start, first) - first, min(stop, last) - first))
            first = last
        if stop > first:
            spec = self.specs[name]
            found.append(torch.zeros(stop - max(start, first), spec.shape[1], dtype=spec.dtype))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _parts(self, layer: int, projection: str) -> Iterator[_Part]:
        """Yield what a matrix of a dense FFN is made of, one after the other."""
        moe, form = self._moe, self._form
        if layer not in self._architecture.mixture_layers:
            name = form.backbone_names(ffn_tensor(layer, projection))[-1]
            yield (lambda start, stop: moe.rows(name, start, stop)), self._dense_size
            return
        if self._shared_size:
            shared = self._shared_name(layer, projection)
            factor = form.factor(shared_tensor(layer, projection))
            yield (lambda start, stop: moe.rows(shared, start, stop) / factor), self._shared_size
        names = [form.expert_tensor(layer, expert, projection) for expert in self._experts]
        yield (
            (lambda start, stop: self._mean(names, start, stop)),
            self._architecture.intermediate_size,
        )

    def _mean(self, names: Sequence[str], start: int, stop: int) -> Tensor:
        if len(names) == 1:
            return self._moe.rows(names[0], start, stop)
        total: Tensor = torch.zeros(())
        for name in names:
            total = total + self._moe.rows(name, start, stop).float()
        return (total / len(names)).to(self._moe.specs[names[0]].dtype)

    # ---- files -------------------------------------------------------------------------------

    def stored_specs(self) -> list[TensorSpec]:
        """Return the tensors as files of the family have them, in model order."""
        owner = {part: whole for whole, parts in self.family.packed.items() for part in parts}
        stored: dict[str, list[TensorSpec]] = {}
        for spec in self.specs.values():
            module, _, kind = spec.name.rpartition(".")
            within = ".".join(module.split(".")[-2:])
            if within in owner:
                name = f"{module.removesuffix(within)}{owner[within]}.{kind}"
            else:
                name = self.family.stored_name(spec.name)
            stored.setdefault(name, []).append(spec)
        return [self._stored(name, parts) for name, parts in stored.items()]

    def _stored(self, name: str, parts: list[TensorSpec]) -> TensorSpec:
        if parts[0].name == name:
            return parts[0]
        # Of those that are one tensor, in the order that the family has them in.
        order = [part for parts_of in self.family.packed.values() for part in parts_of]
        parts = sorted(
            parts, key=lambda p: order.index(".".join(p.name.split(".")[-3:-1])) if order else 0
        )
        rows = sum(part.shape[0] for part in parts)
        return StoredSpec(name, (rows, *parts[0].shape[1:]), parts[0].dtype, tuple(parts))

    def config(self) -> dict[str, Any]:
        """Return `config.json`, under the names that every reader knows."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config, family = self._architecture.config, self.family
        dtype = self.specs[ffn_tensor(self._architecture.num_layers - 1, "up_proj")].dtype
        content = {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
            "model_type": family.model_type,
            **carried_settings(config),
            **{field: getattr(config, field, None) for field in _TOKEN_FIELDS},
            **self._form.rope_fields(self.settings),
            "torch_dtype": str(dtype).removeprefix("torch."),
            **family.fields(self.settings),
        }
        return dict(sorted(content.items()))
