"""Mixtures that are published as a part of a model of text and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upit_merge.io.language_part import language_name, language_settings
from upit_merge.models.formats.base import (
    MixtureFormat,
)

_WHOLE, _ALONE = "model.language_model.", "model."
# What stands beside `text_config`, and nowhere else.
_BESIDE = ("architectures", "transformers_version")
# What stands in both.
# mlx-lm reads the size of a Gemma 4's vocabulary there alone.
_IN_BOTH = (
    "tie_word_embeddings",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "vocab_size",
)


class CompositeFormat(MixtureFormat):
    """The published names and `text_config`, of a model that has no tower to see with.

    Attributes:
        text_type: `model_type` of its language model.
        whole_name: The class that `config.json` names: that of text and images, for some readers
            know no other.
    """

    is_part = True
    text_type: ClassVar[str]
    whole_name: ClassVar[str]

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in (self.name, self.text_type)

    def stored_name(self, name: str) -> str:
        if not name.startswith(_ALONE):
            return name
        return _WHOLE + name.removeprefix(_ALONE)

    def plain_name(self, stored: str) -> str:
        return language_name(stored, {"model_type": self.name})

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        text = {key: value for key, value in fields.items() if key not in _BESIDE}
        return {
            "architectures": [self.whole_name],
            "model_type": self.name,
            **{key: fields[key] for key in _IN_BOTH if key in fields},
            "text_config": dict(sorted({**text, "model_type": self.text_type}.items())),
        }

    def language_part(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return language_settings(raw)

    def with_language_part(
        self, raw: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        if "text_config" not in raw:
            return dict(fields)
        shared = {key: fields[key] for key in _IN_BOTH if key in fields and key in raw}
        return {**raw, **shared, "text_config": dict(fields)}
