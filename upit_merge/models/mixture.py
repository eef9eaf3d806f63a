"""A mixture of experts that is there: what it is, and what fits it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    dense_shapes,
    ffn_tensor,
    format_of,
    is_derived,
    read_dense_config,
    same_setting,
    shared_settings,
)
from upit_merge.models.formats import (
    FORMATS,
    PROJECTIONS,
    MixtureFormat,
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

    def dense_config(self, **changes: Any) -> Any:
        """Return one expert's configuration as a dense model."""
        fields = self.format.dense_fields(self.config) | changes
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "dtype")}
        return self.format.modules().dense_config(**fields)

    def dense_settings(self) -> dict[str, Any]:
        """Return the settings of `DenseArchitecture` that a dense model would have to share."""
        settings = shared_settings(self.dense_config())
        if settings["head_dim"] is None:
            settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
        return settings

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

    form = FORMATS.get(str(moe.config.get("model_type")))
    if form is None:
        titles = " or ".join(form.title for form in FORMATS.values())
        raise UpitError(
            f"{moe.label} has model_type {moe.config.get('model_type')!r}; the router needs a "
            f"{titles} folder, such as the output of a upit recipe."
        )
    check_counts(moe)
    if moe.config.get("quantization_config"):
        raise UpitError(
            f"{moe.label} is quantised (quantization_config); use the unquantised model."
        )
    try:
        # A copy, for transformers completes what is nested in it.
        config = form.modules().moe_config.from_dict(copy.deepcopy(dict(moe.config)))
        architecture = MixtureArchitecture(form, config, *form.sizes(config))
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is unknown")
        form.modules().rotary(config=architecture.dense_config())
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
    form = format_of(dense)
    if form is not architecture.format:
        raise UpitError(
            f"Checkpoint {dense.label} is a {dense.config['model_type']} model, of which no expert "
            f"of a {architecture.format.title} can be made; give one of the kind {moe.label} was "
            "made from."
        )
    settings, theirs = architecture.dense_settings(), shared_settings(read_dense_config(dense))
    for name, value in settings.items():
        if name not in BESIDES_FFN and not same_setting(name, theirs[name], value):
            raise UpitError(
                f"Checkpoint {dense.label} has {name} {theirs[name]}, {moe.label} has {value}; "
                "give a checkpoint of the model it was made from."
            )
    shapes = dict(dense_shapes(form, settings))
    for layer in range(architecture.num_layers):
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
    if not 1 <= config.num_experts_per_tok <= architecture.num_experts:
        raise UpitError(
            f"The config.json of {moe.label} routes a token to {config.num_experts_per_tok} of "
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
    layers = range(settings["num_hidden_layers"])
    ffn = {ffn_tensor(layer, p): (layer, p) for layer in layers for p in PROJECTIONS}
    for name, shape in dense_shapes(form, settings):
        if name not in ffn:
            yield name, shape
            continue
        layer, projection = ffn[name]
        for expert in range(num_experts):
            yield form.expert_tensor(layer, expert, projection), shape
    for name in form.gate_names(len(layers)):
        yield name, (num_experts, settings["hidden_size"])


def mixture_config(
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
    config, form = read_dense_config(donor), format_of(donor)
    tokens = read_dense_config(token_donor)
    settings = shared_settings(config)
    rope = dict(settings.pop("rope_parameters"))
    rope_theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    content = {
        "architectures": [form.class_name],
        "model_type": form.name,
        **settings,
        **carried_settings(config),
        **{field: getattr(tokens, field, None) for field in _TOKEN_FIELDS},
        "rope_theta": rope_theta,
        "rope_scaling": rope if scaled else None,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **form.own_fields(settings, num_experts),
    }
    return dict(sorted(content.items()))


def mixture_specs(
    architecture: DenseArchitecture, num_experts: int, dtype: torch.dtype
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the output's tensors: all but the gates in model order, and the gates."""
    shapes = dict(mixture_shapes(architecture.format, architecture.settings, num_experts))
    gates = set(architecture.format.gate_names(architecture.num_layers))
    specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
    return [s for s in specs if s.name not in gates], [s for s in specs if s.name in gates]


def parameter_counts(
    form: MixtureFormat, settings: Mapping[str, Any], num_experts: int, num_experts_per_token: int
) -> dict[str, int]:
    """Experts, parameters, and of these the active ones: what a token meets in all layers."""
    sizes = {name: prod(shape) for name, shape in mixture_shapes(form, settings, num_experts)}
    expert = sum(sizes[name] for name in form.expert_names(settings["num_hidden_layers"], [0]))
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
