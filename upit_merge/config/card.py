"""The recipe's `card:` block: what the model card says that nobody but its owner knows."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from upit_merge.config.fields import Name, Strict


def _listed(value: Any) -> Any:
    """Accept one text in the place of a list; YAML takes the code of Norwegian for a truth value."""
    values = value if isinstance(value, list) else [value]
    return ["no" if item is False else item for item in values]


Names = Annotated[list[Name], BeforeValidator(_listed), Field(min_length=1)]


class CardSettings(Strict):
    """`card:`, what the model card is to say; nothing that is computed depends on it."""

    EXAMPLE: ClassVar[str] = (
        "name: Ada-8x135M\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [code, math]"
    )

    name: Name | None = Field(
        None,
        description="The model's name, and the card's title; the output folder's if not given.",
    )
    license: Name | None = Field(
        None,
        description="An identifier of the Hub's, such as apache-2.0, or what else it is called; "
        "the base's if not given, and no model states another.",
    )
    language: Names | None = Field(
        None, description="Codes such as en, one or a list; the base's if not given."
    )
    tags: Names | None = Field(None, description="Beside those every mixture gets.")
