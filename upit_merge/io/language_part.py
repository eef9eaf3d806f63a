"""The language model in a model of text and images: its settings, and what its tensors are called.

Such a model has `text_config` in its `config.json`, and `model.language_model.layers.0.…` where a
language model alone has `model.layers.0.…`. Trainers save either with either: only the names tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the model types begin with of which the language model can be read out of such a model.
_READABLE = ("qwen3_5", "gemma4")
# Without `model.` it is what `AutoModel` saves.
_PREFIXES = ("model.language_model.", "language_model.")
# What the whole model decides for its language model.
_OF_THE_WHOLE = ("tie_word_embeddings", "vocab_size")


def language_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the language model in a `config.json`; all, if there is only it."""
    part = config.get("text_config")
    if not isinstance(part, Mapping):
        return config
    return {**part, **{key: config[key] for key in _OF_THE_WHOLE if key in config}}


def language_name(name: str, config: Mapping[str, Any]) -> str:
    """Return what a tensor or module of a language model would be called if it stood alone.

    Args:
        name: As the model of this `config.json` has it.
    """
    if not str(config.get("model_type")).startswith(_READABLE):
        return name
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else f"model.{name.removeprefix(prefix)}"
