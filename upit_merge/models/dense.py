"""What dense models have in common, and the mixture that is made of them, in either format."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
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

LOG = logging.getLogger(__name__)

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
# Those of them that shape no FFN: a base of which only the FFNs are read may have others, such as a
# smaller vocabulary than checkpoints that were given tokens for a chat format.
BESIDES_FFN = ("vocab_size", "tie_word_embeddings", "rope_parameters", "sliding_window")
# What trainers write for the name that all readers know.
_ACTIVATIONS = {"swish": "silu"}
_CARRIED_FIELDS = ("initializer_range", "max_position_embeddings")


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
        specs: Every tensor of a dense model that the output needs, by dense name; as the model has
            it whose settings these are.
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
    if raw.pop("quantization_config", None):
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
    settings = {field: getattr(config, field, None) for field in _SHARED_FIELDS}
    activation = settings["hidden_act"]
    settings["hidden_act"] = _ACTIVATIONS.get(str(activation), activation)
    return settings


def same_setting(field: str, one: Any, other: Any) -> bool:
    """Return whether two values of a shared setting mean the same, in whatever spelling."""
    if field == "rope_parameters":
        return _plain_rope(one) == _plain_rope(other)
    if field == "rms_norm_eps" and isinstance(one, float) and isinstance(other, float):
        # It is added in float32, as which some converters have written it.
        return torch.tensor(one).item() == torch.tensor(other).item()
    return bool(one == other)


def _plain_rope(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    plain = {key: value for key, value in rope.items() if value is not None and key != "type"}
    if plain.get("rope_type", rope.get("type", "default")) == "default":
        return {key: plain.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    return plain


def carried_settings(config: Any) -> dict[str, Any]:
    carried = {field: getattr(config, field, None) for field in _CARRIED_FIELDS}
    # Trainers leave use_cache: false, with which generating takes far longer for the same tokens.
    return carried | {"attention_dropout": config.attention_dropout or 0.0, "use_cache": True}


def context_length(checkpoint: DenseModel) -> int:
    """Return the longest input, in tokens, that a dense checkpoint's configuration allows."""
    return int(read_dense_config(checkpoint).max_position_embeddings)


def inspect_models(
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
    backbone: Sequence[DenseModel],
    wanted: str = "auto",
) -> DenseArchitecture:
    """Check that the models fit together and can become one mixture.

    Of the base only the FFNs are read, unless the backbone is the base's: it must agree with the
    checkpoints in what shapes these, and in what tells that it is the model they come from. The
    checkpoints must agree with each other in everything.

    Args:
        backbone: The models that attention, norms, embeddings and head come from; the settings are
            those of the last.
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
    for checkpoint in checkpoints:
        format_of(checkpoint)
        if checkpoint.config["model_type"] != base.config["model_type"]:
            raise UpitError(
                f"Checkpoint {checkpoint.label} is a {checkpoint.config['model_type']} model, the "
                f"base {base.label} a {base.config['model_type']}; all must come from one base."
            )
    donor = backbone[-1]
    of_base, settings = (shared_settings(read_dense_config(model)) for model in (base, donor))
    for checkpoint in checkpoints:
        theirs = shared_settings(read_dense_config(checkpoint))
        for field, value in theirs.items():
            other, expected = (donor, settings) if field in BESIDES_FFN else (base, of_base)
            if not same_setting(field, value, expected[field]):
                raise _misfit(checkpoint, field, value, other, expected[field], other is base)
    if donor is not base:
        _tell_of_other_base(base, of_base, settings)
    _check_complete(base, f"The base {base.label}", dict(dense_shapes(form, of_base)))
    shapes = dict(dense_shapes(form, settings))
    for checkpoint in checkpoints:
        _check_complete(checkpoint, f"Checkpoint {checkpoint.label}", shapes)
    for model in (base, *checkpoints):
        _check_unknown_tensors(model, form, shapes)
    return DenseArchitecture(form, settings, {name: donor.specs[name] for name in shapes})


def _misfit(
    checkpoint: DenseModel, field: str, value: Any, other: DenseModel, expected: Any, is_base: bool
) -> UpitError:
    """Return the error for a setting in which a checkpoint does not agree."""
    if is_base:
        remedy = "all models must come from the same base"
        if field in BESIDES_FFN:
            remedy = "take the backbone from a checkpoint (leave out backbone: base)"
        return UpitError(
            f"Checkpoint {checkpoint.label} has {field} {value}, the base {other.label} has "
            f"{expected}; {remedy}."
        )
    remedy = "all checkpoints must come from the same run"
    if field == "tie_word_embeddings":
        kinds = {True: "one table for embeddings and head", False: "a head of its own"}
        return UpitError(
            f"Checkpoint {checkpoint.label} has {kinds[bool(value)]}, {other.label}, which the "
            f"backbone comes from, {kinds[bool(expected)]}; save all checkpoints in one way."
        )
    if field == "vocab_size":
        remedy = "resize the embeddings of those that have fewer"
    return UpitError(
        f"Checkpoint {checkpoint.label} has {field} {value}, {other.label}, which the backbone "
        f"comes from, has {expected}; {remedy}."
    )


def _tell_of_other_base(
    base: DenseModel, of_base: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    other = [f for f in BESIDES_FFN if not same_setting(f, of_base[f], settings[f])]
    if other:
        field = other[0]
        LOG.warning(
            "The base %s has %s %s, the checkpoints have %s; only the base's FFNs are read, and "
            "the output is like the checkpoints.",
            base.label,
            field,
            of_base[field],
            settings[field],
        )


def _check_complete(model: DenseModel, who: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a model has every tensor in the shape that its configuration says."""
    for name, shape in shapes.items():
        spec = model.specs.get(name)
        if spec is None or spec.shape != shape:
            found = "lacks it" if spec is None else f"has it in shape {list(spec.shape)}"
            raise UpitError(
                f"{who} should have {name} of shape {list(shape)} by its config.json but {found}; "
                "use a complete checkpoint."
            )


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


def stored_dtype(checkpoint: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the widest dtype among a checkpoint's tensors that matter."""
    dtypes = {spec.dtype for n in architecture.specs if (spec := checkpoint.specs.get(n))}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))


def default_dtype(base: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the output's dtype when the recipe names none: the base's, but never above float32."""
    dtype = stored_dtype(base, architecture)
    return torch.float32 if dtype == torch.float64 else dtype
