"""Whether the models of a merge fit together, and what mixture they become."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.io.sources import DenseModel
from upit_merge.models.dense import (
    BESIDES_FFN,
    DenseArchitecture,
    carried_settings,
    dense_settings,
    family_of,
    format_of,
    invalid_config,
    is_derived,
    left_out,
    read_dense_config,
    same_setting,
)
from upit_merge.models.formats import FORMATS, PLAIN, MixtureFormat
from upit_merge.models.views import split_ffn, stored_model

LOG = logging.getLogger(__name__)


def inspect_models(
    base: DenseModel,
    checkpoints: Sequence[DenseModel],
    backbone: Sequence[DenseModel],
    wanted: str = "auto",
    own: Mapping[str, Any] = PLAIN,
    *,
    only_ffn: bool = False,
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
        only_ffn: Checkpoints that the backbone does not come from lend nothing but their FFNs; in
            what is beside these they may differ, and it is said.

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
                if only_ffn and field in BESIDES_FFN:
                    _warn_of_other_surroundings(checkpoint, field, value, other, expected[field])
                    continue
                raise _misfit(checkpoint, field, value, other, expected[field], other is base)
    if donor is not base:
        _tell_of_other_base(base, of_base, settings)
    whole, settings = (
        settings,
        settings | own_settings(form, own, settings, family_of(donor).targets),
    )
    check_fits(donor, form, settings)
    for caution in (form.caution(settings), family_of(donor).caution(donor.config)):
        if caution:
            LOG.warning("%s", caution)
    if told := family_of(donor).told_of_left_out(left_out(stored_model(donor))):
        LOG.warning("Of %s %s.", donor.label, told)
    _check_complete(base, f"The base {base.label}", dict(form.dense_shapes(of_base)))
    shapes = dict(form.dense_shapes(whole))
    for checkpoint in checkpoints:
        lent = only_ffn and checkpoint not in backbone
        own_shapes = dict(form.dense_shapes(dense_settings(checkpoint))) if lent else shapes
        _check_complete(checkpoint, f"Checkpoint {checkpoint.label}", own_shapes)
        _check_unknown_tensors(checkpoint, form, own_shapes)
    _check_unknown_tensors(base, form, shapes)
    specs = split_ffn(donor, settings).specs
    return DenseArchitecture(
        form, settings, {name: specs[name] for name, _shape in form.dense_shapes(settings)}
    )


def own_settings(
    form: MixtureFormat,
    own: Mapping[str, Any],
    settings: Mapping[str, Any],
    targets: Sequence[str],
) -> dict[str, Any]:
    """Return what the recipe wants of the mixture itself.

    Args:
        settings: The dense model's.
        targets: Names of the formats it can become.

    Raises:
        UpitError: its format has not that.
    """
    shared, dense_layers = own["shared"], own["dense_layers"]
    formats = [FORMATS[name] for name in targets]
    if shared == "auto":
        shared = form.shared[0]
    if shared not in form.shared:
        others = [other.name for other in formats if shared in other.shared]
        raise UpitError(
            f"parameters.shared is {shared}, but a {form.title} has {' or '.join(form.shared)}; "
            f"{_leave_out(others)}."
        )
    if dense_layers and not form.has_dense_layers:
        others = [other.name for other in formats if other.has_dense_layers]
        raise UpitError(
            f"parameters.dense_layers is {dense_layers}, but every layer of a {form.title} is a "
            f"mixture; {_leave_out(others)}."
        )
    if dense_layers >= settings["num_hidden_layers"]:
        raise UpitError(
            f"parameters.dense_layers is {dense_layers}, but the models have "
            f"{settings['num_hidden_layers']} layers, of which one must become a mixture; lower it."
        )
    return {"shared": shared, "dense_layers": dense_layers}


def _leave_out(others: Sequence[str]) -> str:
    return " ".join(["leave it out", *(f"or write architecture: {name}" for name in others)])


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


def _warn_of_other_surroundings(
    checkpoint: DenseModel, field: str, value: Any, donor: DenseModel, expected: Any
) -> None:
    if field == "tie_word_embeddings":  # how the donor stores its own is all that matters
        return
    LOG.warning(
        "Checkpoint %s has %s %s, %s, which the backbone comes from, has %s: its FFN has learned "
        "beside another one than it will work with.",
        checkpoint.label,
        field,
        value,
        donor.label,
        expected,
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


def _check_unknown_tensors(
    checkpoint: DenseModel, form: MixtureFormat, shapes: Mapping[str, Any]
) -> None:
    for name in checkpoint.specs:
        if name not in shapes and not is_derived(name):
            raise UpitError(
                f"Checkpoint {checkpoint.label} has the tensor {name}, which {form.title} has no "
                "place for; use a plain checkpoint without biases or adapters."
            )


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
        raise invalid_config(checkpoint, error) from None
