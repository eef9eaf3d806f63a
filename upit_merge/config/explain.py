"""What is wrong with a recipe, in one sentence: pydantic's findings in the reader's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from upit_merge.errors import UpitError, one_line, shown

# The models of a recipe's blocks, by their place in the document.
Blocks = Mapping[str, type[BaseModel]]

# YAML's aliases may repeat aliases that repeat aliases ("billion laughs"): what is this large with
# all of them written out is refused before it costs time and memory.
_MAX_SIZE = 1_000_000  # a value counts 10, a text its length too
_MAX_BITS = 128  # of a whole number: seeds have 63


def check_yaml_size(document: Any, source: str) -> None:
    """Check that a document can be validated, and quoted in a message, in reasonable time.

    Raises:
        UpitError: with its aliases written out the document is huge or endless, or it has a number
            or a text that cannot even be printed.
    """
    size, left = 0, [document]
    while left:
        value = left.pop()
        size += 10 + (len(value) if isinstance(value, (str, bytes)) else 0)
        if size > _MAX_SIZE:
            raise UpitError(
                f"{source} is too large with its aliases (`*name`) written out; repeat less."
            )
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            left += value
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UpitError(f"{source} holds a number of {value.bit_length()} bits; correct it.")
        elif isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
            raise UpitError(
                f"{source} holds {shown(half[0])}, half of a character; correct the text it is in."
            )


def explain(error: ValidationError, document: Mapping[str, Any], blocks: Blocks) -> str:
    """Return a sentence, without its full stop, for the most telling of pydantic's findings."""
    details = error.errors()
    # A union reports every branch it tried; an unknown key says more than a failed branch.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), None)
    if detail is None:  # that a mapping is not one of some words is no news either
        detail = next((d for d in details if not _is_mapping_for_word(d)), details[0])
    location = _location(detail, document)
    where = one_line(".".join(str(part) for part in location))
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where} ({_hint(str(location[-1]), location[:-1], blocks)})"
    if detail["type"] == "missing":
        return f"{where} is missing; add it"
    if detail["type"] == "invalid_key":
        return f"the key {shown(detail['input'])} is not a text; remove it or put it in quotes"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if location[:1] == ["models"] and len(location) == 2:
        expected = "an entry of the form `- model: FOLDER`"
    else:
        expected = _EXPECTED.get(_field(location)) or _expected(detail)
    return f"{where} is {shown(_value_at(document, location))}, expected {expected}"


def _is_mapping_for_word(detail: Any) -> bool:
    return detail["type"] == "literal_error" and isinstance(detail["input"], Mapping)


def _hint(key: str, location: list[int | str], blocks: Blocks) -> str:
    """Say what the writer of an unknown key may have meant."""
    path = ".".join(part for part in location if isinstance(part, str))
    known = list((blocks.get(path) or blocks.get("density") or blocks[""]).model_fields)
    # `num-experts` and `Num_Experts` are as close to a key as can be.
    if close := difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1):
        return f"did you mean {close[0]}?"
    for block, model in blocks.items():
        if block != "density" and key in model.model_fields:
            return f"it belongs under {block}:" if block else "it belongs at the top level"
    return f"known here: {', '.join(sorted(known))}"


# Where pydantic's account of a union would puzzle more than help.
_EXPECTED = {
    "density": "a number in (0, 1], a list of them over the layers, or a list of filter: and value:",
    "value": "a number in (0, 1] or a list of them over the layers",
    "sample": "a whole number of samples, or a fraction in (0, 1] such as 0.01",
    "temperature": "a number above 0",
    "memory_gb": "a number above 0",
    "models": "a list of `- model: FOLDER` entries, at least one",
    "parameters": "a mapping of parameter names to values",
    "router": "a mapping with at least data: FILE",
    "prompts": "a mapping of experts' numbers to lists of prompts",
    "assign": "lowest, balanced, shuffled, or column: NAME",
    "card": "a mapping such as {license: apache-2.0}",
    "language": "a code such as en, or a list of them",
    "tags": "a word, or a list of them",
    "upit": "a mapping such as {train_experts: true}",
    "refine": "a mapping such as {steps: 100}",
    "lr": "a number above 0",
    "alpha": "a number from 0 to 1",
    "balance": "a number, 0 or more",
    "noise": "a number, 0 or more, such as 0.01",
    "reinitialise": "a number from 0 to below 1, such as 0.5",
    "column": "the name of a column",
    "experts": "a mapping of the column's values to experts' numbers, from 0",
}


def _field(location: list[int | str]) -> str:
    """Return the innermost named key of a path; the entries of a list share their list's name."""
    return next((part for part in reversed(location) if isinstance(part, str)), "")


def _location(detail: Any, document: Any) -> list[int | str]:
    """Find where in the document a finding is; pydantic mixes names of union branches into its path."""
    location: list[int | str] = []
    for part in detail["loc"]:
        inside = isinstance(document, Mapping) and part in document
        if inside or (isinstance(document, list) and isinstance(part, int)):
            location.append(part)
            document = document[part]
    return [*location, detail["loc"][-1]] if detail["type"] == "missing" else location


_PHRASES = {
    "bool_type": "true or false",
    "control_characters": "a text without line ends or other control characters",
    "greater_than_equal": "{ge} or more",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "literal_error": "{expected}",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
}


def _expected(detail: Any) -> str:
    phrase = _PHRASES.get(detail["type"])
    return phrase.format(**detail.get("ctx", {})) if phrase else detail["msg"]


def _value_at(document: Any, location: Iterable[int | str]) -> Any:
    for part in location:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            break
    return document
