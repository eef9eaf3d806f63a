"""What dense models have in common, and the mixture that is made of them, in whatever format."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
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
from upit_merge.models.views import cut_pieces

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
        raise invalid_config(checkpoint, error) from None


def invalid_config(checkpoint: DenseModel, error: Exception) -> UpitError:
    """Return the error for a `config.json` that transformers cannot read."""
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


def is_derived(name: str) -> bool:
    """Old checkpoints carry rotary tables, tied ones a copy of the embeddings."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def stored_dtype(checkpoint: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the widest dtype among a checkpoint's tensors that matter."""
    dtypes = {spec.dtype for n in architecture.specs if (spec := checkpoint.specs.get(n))}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))


def default_dtype(base: DenseModel, architecture: DenseArchitecture) -> torch.dtype:
    """Return the output's dtype when the recipe names none: the base's, but never above float32."""
    dtype = stored_dtype(base, architecture)
    return torch.float32 if dtype == torch.float64 else dtype
