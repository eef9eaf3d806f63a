"""What the models of a recipe's blocks have in common: strictness, names, numbers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError

Number = StrictInt | StrictFloat


def _without_controls(text: str) -> str:
    """Check a name of a model, file or dataset: it is quoted in messages of one line."""
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise PydanticCustomError("control_characters", "control characters")
    return text


Name = Annotated[StrictStr, Field(min_length=1), AfterValidator(_without_controls)]


def as_number(value: Any) -> Any:
    """Convert `1e-3`, which YAML 1.1 reads as a string; mergekit takes it for a number too."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


PositiveNumber = Annotated[
    StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)],
    BeforeValidator(as_number),
    Field(gt=0),
]


NotNegative = Annotated[
    StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)],
    BeforeValidator(as_number),
    Field(ge=0),
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
