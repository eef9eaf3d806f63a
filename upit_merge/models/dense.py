"""What dense models have in common, and the mixture that is made of them, in whatever format."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upit_merge.errors import UpitError, shown
from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import DenseModel, TensorSource
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.families import FAMILIES, DenseFamily, Piece, refusal
from upit_merge.models.formats import (
    COUNT_FIELDS,
    FORMATS,
    PLAIN,
    PROJECTIONS,
    MixtureFormat,
    ffn_tensor,
    mixture_layers,
)
from upit_merge.models.views import cut_pieces, split_ffn, stored_model

LOG = logging.getLogger(__name__)

# Settings that shape no FFN: a base of which only the FFNs are read may have others, such as a
# smaller vocabulary than checkpoints that were given tokens for a chat format.
BESIDES_FFN = ("vocab_size", "tie_word_embeddings", "rope_parameters", "sliding_window")
_CARRIED_FIELDS = ("initializer_range", "max_position_embeddings")


def diverged(model: DenseModel, name: str) -> UpitError:
    """Return the error for a model with NaN or infinite weights in a tensor."""
    return UpitError(
        f"Checkpoint {model.label} has NaN or infinite weights in {name}; use a checkpoint "
        "from before the training diverged."
    )


@dataclass(frozen=True)
class DenseArchitecture:
    """What all models of a merge have in common.

    Attributes:
        format: Of the mixture they become.
        settings: Values of the configuration that shape the computation, and of the mixture's own
            `shared` and `dense_layers`.
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

    @property
    def mixture_layers(self) -> range:
        """The layers whose FFNs become experts."""
        return mixture_layers(self.settings)

    def gate_names(self) -> list[str]:
        """Return the names of the mixture's gates, in layer order."""
        return self.format.gate_names(self.mixture_layers)

    def expert_names(self, experts: Iterable[int]) -> Iterator[str]:
        """Yield the names of all tensors of some of the mixture's experts."""
        return self.format.expert_names(self.mixture_layers, experts)

    def ffn_names(self) -> Iterator[tuple[int, str, str]]:
        """(layer, projection, dense tensor name) of what becomes experts, in layer order."""
        for layer in self.mixture_layers:
            for projection in PROJECTIONS:
                yield layer, projection, ffn_tensor(layer, projection)

    def backbone_names(self) -> list[str]:
        """Return what the mixture calls all that becomes no expert: attention, norms, tables."""
        ffn = {name for _layer, _projection, name in self.ffn_names()}
        rest = (name for name in self.specs if name not in ffn)
        return [own for name in rest for own in self.format.outputs_of(name, self.settings)]


def family_of(checkpoint: DenseModel) -> DenseFamily:
    """Return of what family a dense checkpoint is.

    Raises:
        UpitError: nothing can be made of it.
    """
    model_type = checkpoint.config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise refusal(checkpoint.label, model_type, [*FAMILIES], FORMATS)
    return family


def format_of(checkpoint: DenseModel, wanted: str = "auto") -> MixtureFormat:
    """Return what a dense checkpoint becomes.

    Args:
        wanted: The recipe's `architecture`: the name of a format, or `auto`.

    Raises:
        UpitError: nothing, or not that.
    """
    family = family_of(checkpoint)
    if wanted == "auto":
        return FORMATS[family.targets[0]]
    if wanted not in family.targets:
        kinds = [name for name, other in FAMILIES.items() if wanted in other.targets]
        raise UpitError(
            f"architecture: {wanted} is made from {', '.join(kinds)} checkpoints, but "
            f"{checkpoint.label} has model_type {checkpoint.config['model_type']!r}, which becomes "
            f"{' or '.join(family.targets)}; leave architecture out."
        )
    return FORMATS[wanted]


def check_counts(model: TensorSource) -> None:
    """Refuse a configuration that names more layers or experts than there are tensors.

    What is made of it would have to be listed before the first missing one is noticed.

    Raises:
        UpitError: naming the setting.
    """
    for field in ("num_hidden_layers", *COUNT_FIELDS):
        count = language_settings(model.config).get(field)
        if isinstance(count, int) and count > len(model.specs):
            raise UpitError(
                f"The config.json of {model.label} has {field} {shown(count)}, but the model has "
                f"only {len(model.specs)} tensors; use a complete one."
            )


def read_dense_config(checkpoint: DenseModel) -> Any:
    """transformers' view of a dense configuration, with its defaults filled in.

    Raises:
        UpitError: it is of no family, or uses something that no output can express.
    """
    from transformers.activations import ACT2FN

    raw, family = copy.deepcopy(checkpoint.config), family_of(checkpoint)
    check_counts(checkpoint)
    if unfit := family.unfit(raw):
        raise UpitError(f"Checkpoint {checkpoint.label} {unfit}; use a model without it.")
    if raw.pop("quantization_config", None):
        raise UpitError(
            f"Checkpoint {checkpoint.label} is quantised (quantization_config); use the "
            "unquantised checkpoint."
        )
    try:
        config = family.read(family.language_part(raw))
        activation = family.settings(config)["hidden_act"]
        if activation not in ACT2FN:
            raise ValueError(f"hidden_act {activation!r} is unknown")
        return config
    except Exception as error:  # validation errors of transformers and of huggingface_hub
        raise _invalid(checkpoint, error) from None


def _invalid(checkpoint: DenseModel, error: Exception) -> UpitError:
    reason = " ".join(str(error).split())
    return UpitError(
        f"The config.json of checkpoint {checkpoint.label} is not a valid "
        f"{checkpoint.config['model_type']} configuration ({reason}); copy or download it again."
    )


def dense_settings(checkpoint: DenseModel) -> dict[str, Any]:
    """Return what shapes a checkpoint's computation, see `DenseFamily.settings`.

    Raises:
        UpitError: as `read_dense_config`.
    """
    return {**family_of(checkpoint).settings(read_dense_config(checkpoint)), **PLAIN}


def left_out(checkpoint: DenseModel) -> list[str]:
    """Return which tensors of a checkpoint are no part of what it computes from text.

    Raises:
        UpitError: as `read_dense_config`.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None or not family.renames:
        return []
    settings = dense_settings(checkpoint)
    return [name for name in checkpoint.specs if family.pieces(name, settings) == ()]


def as_llama(checkpoint: DenseModel) -> DenseModel:
    """Return a checkpoint whose tensors have a Llama's names, and none of them is fused.

    One that is of no known family, or has them so, is returned itself.

    Raises:
        UpitError: as `read_dense_config`.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None or not family.renames:
        return checkpoint
    return cut_pieces(checkpoint, family, dense_settings(checkpoint))


def ffn_modules(checkpoint: DenseModel) -> list[str]:
    """Return what the modules of a checkpoint's FFNs are called, in its own words.

    Raises:
        UpitError: as `read_dense_config`.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None or not family.renames:
        return [*PROJECTIONS]
    settings, found = dense_settings(checkpoint), dict[str, None]()
    for name in checkpoint.specs:
        for piece in family.pieces(name, settings) or [Piece(name)]:
            if piece.name.split(".")[-2] in PROJECTIONS:
                found[name.split(".")[-2]] = None
    return [*found]


def check_fits(checkpoint: DenseModel, form: MixtureFormat, settings: Mapping[str, Any]) -> None:
    """Check that a format can express a checkpoint.

    Args:
        settings: The checkpoint's, with the mixture's own.

    Raises:
        UpitError: naming what it cannot, and the formats that can.
    """
    if unfit := form.unfit(settings):
        family = family_of(checkpoint)
        unfit = unfit.replace("sets output_bias,", f"sets {family.output_bias_field},")
        targets = (FORMATS[name] for name in family.targets)
        others = [f for f in targets if f is not form and not f.unfit(settings)]
        remedy = "use a model without it"
        if others:
            told = "".join(
                f", which {reader} reads {note}"
                for reader, note in others[0].readers.items()
                if note
            )
            remedy = f"write architecture: {others[0].name}{told}"
        raise UpitError(f"Checkpoint {checkpoint.label} {unfit}; {remedy}.")
    try:
        # What the output could not be loaded with must show now, not after the merge.
        config = read_dense_config(checkpoint)
        fields = form.fields(settings, 2) | form.rope_fields(settings) | carried_settings(config)
        form.read(form.document({"model_type": form.name, **fields}))
    except UpitError:
        raise
    except Exception as error:
        raise _invalid(checkpoint, error) from None


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
    if any(isinstance(value, Mapping) for value in rope.values()):  # by kind of layer
        return {kind: _plain_rope(own) for kind, own in rope.items()}
    plain = {key: value for key, value in rope.items() if value is not None and key != "type"}
    if plain.get("rope_type", rope.get("type", "default")) == "default":
        return plain.get("rope_theta"), plain.get("partial_rotary_factor") or 1.0
    return plain


def carried_settings(config: Any) -> dict[str, Any]:
    """Return what of a dense model's configuration an output's has as it is."""
    carried = {field: getattr(config, field, None) for field in _CARRIED_FIELDS}
    # Trainers leave use_cache: false, with which generating takes far longer for the same tokens.
    return carried | {
        "attention_dropout": getattr(config, "attention_dropout", 0.0) or 0.0,
        "use_cache": True,
    }


def context_length(checkpoint: DenseModel) -> int:
    """Return the longest input, in tokens, that a dense checkpoint's configuration allows."""
    return int(read_dense_config(checkpoint).max_position_embeddings)


def inspect_models(
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
    backbone: Sequence[DenseModel],
    wanted: str = "auto",
    own: Mapping[str, Any] = PLAIN,
) -> DenseArchitecture:
    """Check that the models fit together and can become one mixture.

    Of the base only the FFNs are read, unless the backbone is the base's: it must agree with the
    checkpoints in what shapes these, and in what tells that it is the model they come from. The
    checkpoints must agree with each other in everything.

    Args:
        base, checkpoints, backbone: As Llamas, see `as_llama`. Attention, norms, embeddings and
            head come from those of `backbone`; the settings are those of its last.
        wanted: The recipe's `architecture`: the name of a format, or `auto`.
        own: The mixture's own settings, `shared` (`auto` is what the format has by default) and
            `dense_layers`.

    Raises:
        UpitError: naming the checkpoint and the field or tensor that does not fit.
    """
    form = format_of(base, wanted)
    for checkpoint in checkpoints:
        if family_of(checkpoint) is not family_of(base):
            raise UpitError(
                f"Checkpoint {checkpoint.label} is a {checkpoint.config['model_type']} model, the "
                f"base {base.label} a {base.config['model_type']}; all must come from one base."
            )
    donor = backbone[-1]
    of_base, settings = (dense_settings(model) for model in (base, donor))
    for checkpoint in checkpoints:
        theirs = dense_settings(checkpoint)
        for field, value in theirs.items():
            other, expected = (donor, settings) if field in BESIDES_FFN else (base, of_base)
            if not same_setting(field, value, expected[field]):
                raise _misfit(checkpoint, field, value, other, expected[field], other is base)
    if donor is not base:
        _tell_of_other_base(base, of_base, settings)
    whole, settings = settings, settings | own_settings(form, own, settings)
    check_fits(donor, form, settings)
    for caution in (form.caution(settings), family_of(donor).caution(donor.config)):
        if caution:
            LOG.warning("%s", caution)
    if told := family_of(donor).told_of_left_out(left_out(stored_model(donor))):
        LOG.warning("Of %s %s.", donor.label, told)
    _check_complete(base, f"The base {base.label}", dict(form.dense_shapes(of_base)))
    shapes = dict(form.dense_shapes(whole))
    for checkpoint in checkpoints:
        _check_complete(checkpoint, f"Checkpoint {checkpoint.label}", shapes)
    for model in (base, *checkpoints):
        _check_unknown_tensors(model, form, shapes)
    specs = split_ffn(donor, settings).specs
    return DenseArchitecture(
        form, settings, {name: specs[name] for name, _shape in form.dense_shapes(settings)}
    )


def own_settings(
    form: MixtureFormat, own: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the recipe wants of the mixture itself.

    Raises:
        UpitError: its format has not that.
    """
    shared, dense_layers = own["shared"], own["dense_layers"]
    if shared == "auto":
        shared = form.shared[0]
    if shared not in form.shared:
        others = [f.name for f in FORMATS.values() if shared in f.shared]
        remedy = f"that has {' or '.join(others)}, if the checkpoints can become one"
        raise UpitError(
            f"parameters.shared is {shared}, but a {form.title} has {' or '.join(form.shared)}; "
            f"leave it out, or write an architecture: {remedy}."
        )
    if dense_layers and not form.has_dense_layers:
        others = [f.name for f in FORMATS.values() if f.has_dense_layers]
        raise UpitError(
            f"parameters.dense_layers is {dense_layers}, but every layer of a {form.title} is a "
            f"mixture; leave it out, or write an architecture: that can ({', '.join(others)})."
        )
    if dense_layers >= settings["num_hidden_layers"]:
        raise UpitError(
            f"parameters.dense_layers is {dense_layers}, but the models have "
            f"{settings['num_hidden_layers']} layers, of which one must become a mixture; lower it."
        )
    return {"shared": shared, "dense_layers": dense_layers}


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
