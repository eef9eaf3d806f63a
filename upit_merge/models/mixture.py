"""A mixture of experts that is there: what it is, and what fits it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import (
    PICKLED_WEIGHTS,
    SAFE_WEIGHTS,
    has_any,
)
from upit_merge.io.hub import OpenOptions
from upit_merge.io.sources import DenseModel, TensorSource
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.dense import (
    BESIDES_FFN,
    DenseArchitecture,
    carried_settings,
    check_counts,
    dense_settings,
    family_of,
    is_derived,
    read_dense_config,
    same_setting,
)
from upit_merge.models.families import SHARED_FIELDS
from upit_merge.models.formats import (
    FORMATS,
    PLAIN,
    PROJECTIONS,
    MixtureFormat,
    ffn_tensor,
    fits_grouped_products,
    found_format,
    mixture_layers,
    routed_size,
)
from upit_merge.models.published import PublishedMixture
from upit_merge.models.tables import with_own_head

_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class MixtureArchitecture:
    """A mixture that is there.

    Attributes:
        format: Its names.
        config: transformers' view of its configuration.
        num_experts, intermediate_size: Of every layer.
    """

    format: MixtureFormat
    config: Any
    num_experts: int
    intermediate_size: int

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def mixture_layers(self) -> range:
        """The layers that have experts."""
        return mixture_layers(self.dense_settings())

    def backbone_of(self, layer: int, names: Iterable[str]) -> dict[str, str]:
        """Return which of a mixture's tensors a layer has beside gate and experts.

        Returns:
            Their names, by what a decoder layer of transformers calls them.
        """
        prefix = self.format.layer_prefix(layer)
        return {
            self.format.memory_name(name.removeprefix(prefix)): name
            for name in names
            # Old folders hold tables that are computed.
            if name.startswith(prefix) and self.format.is_backbone(name) and not is_derived(name)
        }

    def gate_names(self) -> list[str]:
        """Return the names of all gates, in layer order."""
        return self.format.gate_names(self.mixture_layers)

    def of_gates(self) -> list[str]:
        """Return the names of all that changes with the number of experts, beside these."""
        return of_gates(self.format, self.dense_settings())

    def expert_names(self, experts: Iterable[int]) -> Iterator[str]:
        """Yield the names of all tensors of some experts."""
        return self.format.expert_names(self.mixture_layers, experts)

    def dense_settings(self) -> dict[str, Any]:
        """Return the settings of `DenseArchitecture` that a dense model would have to share."""
        return self.format.settings(self.config)

    def shapes(self, num_experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor it would have with this many experts."""
        return mixture_shapes(self.format, self.dense_settings(), num_experts)


def inspect_mixture(moe: TensorSource) -> MixtureArchitecture:
    """Check that a folder is a mixture, with every tensor under its published name.

    Raises:
        UpitError: as `read_mixture`, or naming the tensor that is missing, has another shape or should
            not be there.
    """
    architecture = read_mixture(moe)
    _check_tensors(moe, architecture)
    return architecture


def read_mixture(moe: TensorSource) -> MixtureArchitecture:
    """Return what a mixture is by its configuration; its tensors are not looked at.

    Raises:
        UpitError: its configuration is of another kind or not valid.
    """
    from transformers.activations import ACT2FN

    form = found_format(moe.config)
    if form is None:
        *titles, last = (form.title for form in FORMATS.values())
        raise UpitError(
            f"{moe.label} has model_type {moe.config.get('model_type')!r}; the router needs a "
            f"{', '.join(titles)} or {last} folder, such as the output of a upit recipe."
        )
    check_counts(moe)
    if moe.config.get("quantization_config"):
        raise UpitError(
            f"{moe.label} is quantised (quantization_config); use the unquantised model."
        )
    try:
        # A copy, for transformers completes what is nested in it.
        config = form.read(copy.deepcopy(dict(moe.config)))
        architecture = MixtureArchitecture(form, config, *form.sizes(config))
        activation = architecture.dense_settings()["hidden_act"]
        if activation not in ACT2FN:
            raise ValueError(f"hidden_act {activation!r} is unknown")
        rope = architecture.dense_settings()["rope_parameters"] or {}
        if not isinstance(theta := rope.get("rope_theta", 1), int | float):
            raise ValueError(f"rope_theta {theta!r} is no number")
    except Exception as error:  # validation errors of transformers and of huggingface_hub
        reason = " ".join(str(error).split())
        raise UpitError(
            f"The config.json of {moe.label} is not a valid {form.title} configuration ({reason}); "
            "make the model again."
        ) from None
    if unfit := form.unfit_mixture(config):
        raise UpitError(f"{moe.label} {unfit}; use a model of which every layer is a mixture.")
    return architecture


def check_expert(moe: TensorSource, dense: DenseModel) -> MixtureArchitecture:
    """Check that a dense model's FFN can become an expert of a mixture; returns the mixture's.

    Raises:
        UpitError: naming the setting or tensor that does not fit, or as `inspect_mixture`.
    """
    architecture = inspect_mixture(moe)
    form, family = architecture.format, family_of(dense)
    if form.name not in family.targets:
        raise UpitError(
            f"Checkpoint {dense.label} is a {dense.config['model_type']} model, of which no expert "
            f"of a {form.title} can be made; give one of the kind {moe.label} was made from."
        )
    settings, theirs = architecture.dense_settings(), dense_settings(dense)
    for name in SHARED_FIELDS:
        value = settings[name]
        if name not in BESIDES_FFN and not same_setting(name, theirs[name], value):
            raise UpitError(
                f"Checkpoint {dense.label} has {name} {theirs[name]}, {moe.label} has {value}; "
                "give a checkpoint of the model it was made from."
            )
    shapes = dict(form.dense_shapes({**settings, **PLAIN}))
    for layer in architecture.mixture_layers:
        for name in (ffn_tensor(layer, projection) for projection in PROJECTIONS):
            spec = dense.specs.get(name)
            if spec is None or spec.shape != shapes[name]:
                found = "lacks it" if spec is None else f"has it in shape {list(spec.shape)}"
                raise UpitError(
                    f"Checkpoint {dense.label} should have {name} of shape {list(shapes[name])} "
                    f"but {found}; use a complete checkpoint."
                )
    return architecture


def _check_tensors(moe: TensorSource, architecture: MixtureArchitecture) -> None:
    title, config = architecture.format.title, architecture.config
    shapes = dict(architecture.shapes(architecture.num_experts))
    for name in moe.specs:
        if name not in shapes and not is_derived(name):
            raise UpitError(
                f"{moe.label} has the tensor {name}, which a {title} has not; the router needs a "
                f"plain {title}, such as the output of a upit recipe."
            )
    chosen = architecture.format.chosen(config)
    if not 1 <= chosen <= architecture.num_experts:
        raise UpitError(
            f"The config.json of {moe.label} routes a token to {chosen} of "
            f"{architecture.num_experts} experts; correct num_experts_per_tok."
        )
    for name, shape in shapes.items():
        spec = moe.specs.get(name)
        if spec is None:
            raise UpitError(
                f"{moe.label} has no tensor {name}; the router needs a complete {title} under the "
                "published names, such as the output of a upit recipe."
            )
        if spec.shape != shape:
            raise UpitError(
                f"{moe.label} has {name} of shape {list(spec.shape)}, its config.json says "
                f"{list(shape)}; make the model again."
            )


def mixture_shapes(
    form: MixtureFormat, settings: Mapping[str, Any], num_experts: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a mixture, in model order; the gates come last."""
    layers = mixture_layers(settings)
    ffn = {ffn_tensor(layer, p): (layer, p) for layer in layers for p in PROJECTIONS}
    for name, shape in form.dense_shapes(settings):
        if name not in ffn:
            yield from ((own, shape) for own in form.outputs_of(name, settings))
            continue
        layer, projection = ffn[name]
        for expert in range(num_experts):
            yield form.expert_tensor(layer, expert, projection), shape
    for constant in form.constants(settings, num_experts):
        yield constant.name, constant.shape
    for name in form.gate_names(layers):
        yield name, (num_experts, settings["hidden_size"])


def of_gates(form: MixtureFormat, settings: Mapping[str, Any]) -> list[str]:
    """Return the names of what changes with the number of experts: the gates, and their biases."""
    one, other = (
        {constant.name: constant.shape for constant in form.constants(settings, count)}
        for count in (1, 2)
    )
    biases = [name for name, shape in one.items() if other[name] != shape]
    return [*biases, *form.gate_names(mixture_layers(settings))]


def mixture_config(
    architecture: DenseArchitecture,
    donor: DenseModel,
    token_donor: DenseModel,
    num_experts: int,
    experts_per_token: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the output's `config.json`.

    Rope settings and dtype are written under the names that every reader knows (transformers 4
    and 5, vLLM, llama.cpp), not under those only transformers 5 writes.

    Args:
        donor: The checkpoint whose settings the output carries.
        token_donor: The one whose special token ids it carries, that of the tokenizer.
    """
    config, form, settings = read_dense_config(donor), architecture.format, architecture.settings
    tokens = read_dense_config(token_donor)
    content = {
        "architectures": [form.class_name],
        "model_type": form.name,
        **carried_settings(config),
        **{field: getattr(tokens, field, None) for field in _TOKEN_FIELDS},
        **form.rope_fields(settings),
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **form.fields(settings, num_experts),
    }
    together = fits_grouped_products((settings["hidden_size"], routed_size(settings)))
    # transformers 5 ends in an error otherwise. Of a part of a larger model it looks for the setting
    # in the whole's, and in the part's where that is read alone.
    products = {} if together else {"experts_implementation": "eager"}
    content = form.document(content | products) | products
    return dict(sorted(content.items()))


def mixture_specs(
    architecture: DenseArchitecture, num_experts: int, dtype: torch.dtype
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the output's tensors: in model order, and what belongs to the gates, see `of_gates`."""
    shapes = dict(mixture_shapes(architecture.format, architecture.settings, num_experts))
    gates = set(of_gates(architecture.format, architecture.settings))
    specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
    return [s for s in specs if s.name not in gates], [s for s in specs if s.name in gates]


def parameter_counts(
    form: MixtureFormat, settings: Mapping[str, Any], num_experts: int, num_experts_per_token: int
) -> dict[str, int]:
    """Experts, parameters, and of these the active ones: what a token meets in all layers."""
    sizes = {name: prod(shape) for name, shape in mixture_shapes(form, settings, num_experts)}
    expert = sum(sizes[name] for name in form.expert_names(mixture_layers(settings), [0]))
    idle = (num_experts - num_experts_per_token) * expert
    total = sum(sizes.values())
    return {"num_experts": num_experts, "parameters": total, "active_parameters": total - idle}


@contextlib.contextmanager
def opened_mixture(
    folder: Path, label: str = "the output", config: dict[str, Any] | None = None
) -> Iterator[PublishedMixture]:
    """Open a MoE folder for reading, by its published names; closes it again.

    Args:
        config: The content of its `config.json`, if that is not written yet.

    Raises:
        UpitError: it cannot be read, or not without running code.
    """
    if not has_any(folder, SAFE_WEIGHTS) and has_any(folder, PICKLED_WEIGHTS):
        raise UpitError(f"{label} has its weights in .bin files; convert it to safetensors first.")
    moe = PublishedMixture(label, folder, OpenOptions(), config=config)
    with contextlib.closing(with_own_head(moe)):
        yield moe
