"""What a family of dense models has to say of itself; what becomes of it, the formats know."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from upit_merge.io.language_part import language_settings

# Settings that shape the computation, hence must be the same in every model, and that every
# configuration calls alike.
SHARED_FIELDS = (
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
# What sets one dense model apart from a plain Llama, whose values these are. A format says which
# of them it can express, in `MixtureFormat.expresses`.
QUALITIES: Mapping[str, Any] = {
    "attention_bias": False,  # of queries, keys and values
    "output_bias": False,  # of the attention's output
    "mlp_bias": False,
    "qk_norm": False,  # an RMS norm of every head's queries and keys
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,  # in place of 1 / sqrt(head_dim)
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,  # by which the logits are divided
}
# What trainers write for the name that all readers know.
_ACTIVATIONS = {"swish": "silu"}


def attention_biases(config: Any) -> dict[str, bool]:
    """Return the biases of attention, by a configuration in which one setting means both kinds."""
    bias = bool(config.attention_bias)
    return {"attention_bias": bias, "output_bias": bias}


def rotary_share(config: Any) -> float:
    """Return which share of a head's dimensions is rotated, by a configuration's rope settings."""
    rope = config.rope_parameters or {}
    return float(rope.get("partial_rotary_factor") or 1.0)


@dataclass(frozen=True)
class Piece:
    """A tensor that is all of a stored one under another name, or rows of it.

    Attributes:
        name: As a Llama would have it.
        rows: First row and the one after the last; None where it is all of them.
        padded: Its shape, (rows, columns), where zeros follow what is stored; else None.
    """

    name: str
    rows: tuple[int, int] | None = None
    padded: tuple[int, int] | None = None


class DenseFamily(ABC):
    """Dense models of one `model_type`, seen as a Llama with a few qualities.

    Attributes:
        model_type: In their `config.json`.
        title: What people call them.
        targets: Names of the formats that they can become; `architecture: auto` is the first.
        more_fields: Settings beside `SHARED_FIELDS` that shape their computation, as
            transformers' configuration calls them; formats made for them alone read these.
        output_bias_field: What its `config.json` calls that quality.
        renames: Its tensors are not a Llama's: `pieces` tells.
        packed: Names of modules in its files that hold the rows of several, and which.
        other_types: What `model_type` may be as well, as of the model of text and images that it is
            the language model of.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    more_fields: ClassVar[tuple[str, ...]] = ()
    # In most configurations one setting means both kinds of biases.
    output_bias_field: ClassVar[str] = "attention_bias"
    renames: ClassVar[bool] = False
    packed: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    other_types: ClassVar[tuple[str, ...]] = ()

    def language_part(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of the language model in a `config.json`: mostly all of them."""
        return language_settings(raw)

    def unfit(self, raw: Mapping[str, Any]) -> str | None:
        """What of a `config.json` no format can express, as "sets …"; else None."""
        return None

    def read(self, raw: Mapping[str, Any]) -> Any:
        """transformers' view of a `config.json`, with its defaults filled in."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type].from_dict(dict(raw))

    def caution(self, raw: Mapping[str, Any]) -> str | None:
        """What people should know of what becomes of such a `config.json`, as a sentence."""
        return None

    def qualities(self, config: Any) -> Mapping[str, Any]:
        """Return those of `QUALITIES` in which a model is not a plain Llama."""
        return {}

    def settings(self, config: Any) -> dict[str, Any]:
        """Return all that shapes the computation, from transformers' view of a configuration."""
        settings = {field: getattr(config, field, None) for field in SHARED_FIELDS}
        settings["hidden_act"] = _ACTIVATIONS.get(
            str(settings["hidden_act"]), settings["hidden_act"]
        )
        settings["head_dim"] = settings["head_dim"] or (
            config.hidden_size // config.num_attention_heads
        )
        more = {field: getattr(config, field, None) for field in self.more_fields}
        return {**settings, **QUALITIES, **self.qualities(config), **more}

    def fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a `config.json` says these settings, rope aside; undoes `settings`."""
        shared = {field: settings[field] for field in SHARED_FIELDS if field != "rope_parameters"}
        return {**shared, **self.own_fields(settings)}

    def own_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what such a `config.json` has beside the fields that all families share."""
        return {}

    def stored_name(self, name: str) -> str:
        """What a tensor that is not packed is called in its files; undoes `pieces`."""
        return name

    def told_of_left_out(self, names: Sequence[str]) -> str | None:
        """What people should know of tensors that are left out, after "Of MODEL "; else None.

        Args:
            names: Those of a model of which `pieces` says that they are none.
        """
        return None

    def pieces(self, name: str, settings: Mapping[str, Any]) -> Sequence[Piece] | None:
        """Return which tensors a stored one is: none, one by another name, or several.

        Args:
            name: As transformers has it.
            settings: See `settings`.

        Returns:
            None where it is one a Llama has, by that name.
        """
        return None
