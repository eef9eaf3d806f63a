"""What dense models have in common, and the mixture that is made of them, in either format."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upit_merge.errors import UpitError, shown
from upit_merge.io.sources import DenseModel, TensorSource
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.formats import (
    COUNT_FIELDS,
    DENSE_TYPES,
    FORMATS,
    PROJECTIONS,
    MixtureFormat,
    format_of_dense,
)

# Settings that shape the computation, hence must be the same in every model.
_SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)
_CARRIED_FIELDS = ("initializer_range", "max_position_embeddings", "use_cache")


def diverged(model: DenseModel, name: str) -> UpitError:
    """Return the error for a model with NaN or infinite weights in a tensor."""
    return UpitError(
        f"Checkpoint {model.label} has NaN or infinite weights in {name}; use a checkpoint "
        "from before the training diverged."
    )


def norm_tensor(layer: int) -> str:
    """Name of the norm before a layer's gate, shape (hidden_size,)."""
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def ffn_tensor(layer: int, projection: str) -> str:
    """Name of a dense model's FFN projection."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


@dataclass(frozen=True)
class DenseArchitecture:
    """What all models of a merge have in common.

    Attributes:
        format: Of the mixture they become.
        settings: Values of the configuration that shape the computation.
        specs: Every tensor of the base that the output needs, by dense name.
    """

    format: MixtureFormat
    settings: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]

    @property
    def num_layers(self) -> int:
        return int(self.settings["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.settings["hidden_size"])

    def ffn_names(self) -> Iterator[tuple[int, str, str]]:
        """(layer, projection, dense tensor name) of every FFN tensor, in layer order."""
        for layer in range(self.num_layers):
            for projection in PROJECTIONS:
                yield layer, projection, ffn_tensor(layer, projection)

    def backbone_names(self) -> list[str]:
        """Return everything that is not FFN: attention, norms, embeddings, head."""
        ffn = {name for _layer, _projection, name in self.ffn_names()}
        return [name for name in self.specs if name not in ffn]


def dense_shapes(
    form: MixtureFormat, settings: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a dense model without biases, in model order."""
    hidden, inner, head = (settings[f] for f in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (settings[f"num_{f}_heads"] * head for f in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (settings["vocab_size"], hidden)
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        for name, shape in form.attention_norms(head).items():
            yield f"{prefix}self_attn.{name}.weight", shape
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for projection in PROJECTIONS:
            shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
            yield ffn_tensor(layer, projection), shape
    yield "model.norm.weight", (hidden,)
    if not settings["tie_word_embeddings"]:
        yield "lm_head.weight", (settings["vocab_size"], hidden)


def format_of(checkpoint: DenseModel) -> MixtureFormat:
    """Return what a dense checkpoint becomes.

    Raises:
        UpitError: nothing, as it is of a kind that is not known.
    """
    model_type = checkpoint.config.get("model_type")
    form = format_of_dense(model_type)
    if form is None:
        raise UpitError(
            f"Checkpoint {checkpoint.label} has model_type {model_type!r}; use "
            f"{', '.join(DENSE_TYPES[:-1])} or {DENSE_TYPES[-1]} checkpoints."
        )
    return form


def check_counts(model: TensorSource) -> None:
    """Refuse a configuration that names more layers or experts than there are tensors.

    What is made of it would have to be listed before the first missing one is noticed.

    Raises:
        UpitError: naming the setting.
    """
    for field in ("num_hidden_layers", *COUNT_FIELDS):
        count = model.config.get(field)
        if isinstance(count, int) and count > len(model.specs):
            raise UpitError(
                f"The config.json of {model.label} has {field} {shown(count)}, but the model has "
                f"only {len(model.specs)} tensors; use a complete one."
            )


def read_dense_config(checkpoint: DenseModel) -> Any:
    """transformers' view of a dense configuration, with its defaults filled in.

    Raises:
        UpitError: it is of another kind, or uses something the output cannot express.
    """
    from transformers.activations import ACT2FN

    raw, form = copy.deepcopy(checkpoint.config), format_of(checkpoint)
    check_counts(checkpoint)
    if unfit := form.unfit_dense(raw):
        raise UpitError(f"Checkpoint {checkpoint.label} {unfit}; use a model without it.")
    if "quantization_config" in raw:
        raise UpitError(
            f"Checkpoint {checkpoint.label} is quantised (quantization_config); use the "
            "unquantised checkpoint."
        )
    try:
        config = form.read_dense(raw)
        # What the output could not be loaded with must show now, not after the merge.
        fields = (
            shared_settings(config)
            | carried_settings(config)
            | form.own_fields(shared_settings(config), 1)
        )
        form.modules().moe_config.from_dict(fields)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is unknown")
        return config
    except Exception as error:  # validation errors of transformers and of huggingface_hub
        reason = " ".join(str(error).split())
        raise UpitError(
            f"The config.json of checkpoint {checkpoint.label} is not a valid {raw['model_type']} "
            f"configuration ({reason}); copy or download it again."
        ) from None


def shared_settings(config: Any) -> dict[str, Any]:
    """Settings that shape the computation, from transformers' view of a dense configuration."""
    return {field: getattr(config, field, None) for field in _SHARED_FIELDS}


def carried_settings(config: Any) -> dict[str, Any]:
    carried = {field: getattr(config, field, None) for field in _CARRIED_FIELDS}
    return carried | {"attention_dropout": config.attention_dropout or 0.0}


def context_length(checkpoint: DenseModel) -> int:
    """Return the longest input, in tokens, that a dense checkpoint's configuration allows."""
    return int(read_dense_config(checkpoint).max_position_embeddings)


def inspect_models(
    base: DenseModel, checkpoints: Sequence[DenseModel], wanted: str = "auto"
) -> DenseArchitecture:
    """Check that the models fit together and can become one mixture.

    Args:
        wanted: The recipe's `architecture`: the name of a format, or `auto`.

    Raises:
        UpitError: naming the checkpoint and the field or tensor that does not fit.
    """
    form = format_of(base)
    if wanted not in ("auto", form.name):
        kinds = " or ".join(FORMATS[wanted].dense_types)
        raise UpitError(
            f"architecture: {wanted} is made from {kinds} checkpoints, but {base.label} has "
            f"model_type {base.config['model_type']!r}, which becomes {form.name}; leave "
            "architecture out."
        )
    config = read_dense_config(base)
    settings = shared_settings(config)
    for checkpoint in checkpoints:
        theirs = read_dense_config(checkpoint)
        if checkpoint.config["model_type"] != base.config["model_type"]:
            raise UpitError(
                f"Checkpoint {checkpoint.label} is a {checkpoint.config['model_type']} model, the "
                f"base {base.label} a {base.config['model_type']}; all must come from one base."
            )
        for field, value in shared_settings(theirs).items():
            if value != settings[field]:
                remedy = (
                    "resize the base's embeddings to the tokenizer the checkpoints were trained "
                    "with"
                    if field == "vocab_size"
                    else "all models must come from the same base"
                )
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has {field} {value}, the base {base.label} has "
                    f"{settings[field]}; {remedy}."
                )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in dense_shapes(form, settings):
        spec = base.specs.get(name)
        if spec is None or spec.shape != shape:
            found = "lacks it" if spec is None else f"has it in shape {list(spec.shape)}"
            raise UpitError(
                f"The base {base.label} should have {name} of shape {list(shape)} by its "
                f"config.json but {found}; use a complete checkpoint."
            )
        shapes[name] = shape
    for checkpoint in (base, *checkpoints):
        _check_unknown_tensors(checkpoint, form, shapes)
    _check_same_tensors(base, checkpoints, shapes)
    return DenseArchitecture(form, settings, {name: base.specs[name] for name in shapes})


def is_derived(name: str) -> bool:
    """Old checkpoints carry rotary tables, tied ones a copy of the embeddings."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _check_unknown_tensors(
    checkpoint: DenseModel, form: MixtureFormat, shapes: Mapping[str, Any]
) -> None:
    for name in checkpoint.specs:
        if name not in shapes and not is_derived(name):
            raise UpitError(
                f"Checkpoint {checkpoint.label} has the tensor {name}, which {form.title} has no "
                "place for; use a plain checkpoint without biases or adapters."
            )


def _check_same_tensors(
    base: DenseModel, others: Sequence[DenseModel], names: Iterable[str]
) -> None:
    """Check that every other model has the given tensors of the base, in the base's shapes.

    Raises:
        UpitError: naming the checkpoint, the tensor and both shapes.
    """
    for name in names:
        for checkpoint in others:
            spec = checkpoint.specs.get(name)
            if spec is None:
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has no tensor {name}; use a complete "
                    f"{base.config.get('model_type')} checkpoint."
                )
            expected = base.specs[name].shape
            if spec.shape == expected:
                continue
            table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            if table and len(spec.shape) == 2 and spec.shape[1:] == expected[1:]:
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has a vocabulary of {spec.shape[0]} in {name}, "
                    f"the base {base.label} one of {expected[0]}; resize the base's embeddings to "
                    "the tokenizer the checkpoints were trained with."
                )
            raise UpitError(
                f"Checkpoint {checkpoint.label} has {name} of shape {list(spec.shape)}, the base "
                f"{base.label} has {list(expected)}; all models must come from the same base."
            )


def stored_dtype(checkpoint: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the widest dtype among a checkpoint's tensors that matter."""
    dtypes = {checkpoint.specs[name].dtype for name in architecture.specs}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))


def default_dtype(base: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the output's dtype when the recipe names none: the base's, but never above float32."""
    dtype = stored_dtype(base, architecture)
    return torch.float32 if dtype == torch.float64 else dtype
