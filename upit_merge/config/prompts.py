"""`router.prompts`: a few lines for each expert, in a recipe or in a file of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, StrictStr

from upit_merge.config.explain import check_yaml_size
from upit_merge.config.yaml_file import parse_yaml, read_yaml_text
from upit_merge.data.prompts import PromptSource
from upit_merge.errors import UpitError, shown
from upit_merge.io.untrusted import read_json


def with_numbers(value: Any, source: PromptSource) -> Any:
    """Return prompts by the experts' numbers, which may be texts, as all keys in JSON are.

    Raises:
        ValueError: naming the source, a sentence without its full stop: they are none.
    """
    if not isinstance(value, Mapping):
        return value
    found: dict[Any, Any] = {}
    for key, listed in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 9 else key
        if type(number) is not int or number < 0:
            raise ValueError(
                f"{source} has the key {shown(key)}, expected an expert's number, from 0"
            )
        if number in found:
            raise ValueError(f"{source} has expert {number} twice; put its prompts together")
        found[number] = listed
    if not found:
        raise ValueError(f"{source} is empty; write a few lines for each expert")
    for number, listed in found.items():
        if not isinstance(listed, list) or not listed:
            raise ValueError(
                f"{source.of(number)} is {shown(listed)}, expected a list of prompts, at least one"
            )
        for prompt in listed:
            if not prompt or not isinstance(prompt, str | list) or not _is_said(prompt):
                raise ValueError(
                    f"{source.of(number)} holds {shown(prompt)}, expected a text, or a list of "
                    "{role, content}"
                )
    return found


def _is_said(prompt: str | list[Any]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    # With names for keys, as pydantic insists on without a word of where.
    return all(isinstance(m, dict) and all(isinstance(key, str) for key in m) for m in prompt)


def _of_recipe(value: Any) -> Any:
    return with_numbers(value, PromptSource())


Prompts = Annotated[
    dict[Annotated[StrictInt, Field(ge=0)], list[StrictStr | list[dict[str, Any]]]],
    BeforeValidator(_of_recipe),
]


def load_prompts(path: Path) -> dict[int, list[Any]]:
    """Read prompts from a file, YAML or (`.json`) JSON.

    Raises:
        UpitError: naming the file, which cannot be read, or has no prompts by experts' numbers.
    """
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise UpitError(f"The file of prompts {path} does not exist; correct the path.")
        document: Any = read_json(path, "file of prompts", by_hand=True)
    else:
        document = parse_yaml(read_yaml_text(path, "file of prompts"), str(path))
    check_yaml_size(document, str(path))
    if not isinstance(document, Mapping):
        raise UpitError(
            f"{path} is not a mapping of experts' numbers to lists of prompts; write "
            '`0: ["a prompt", "another"]` and so on.'
        )
    try:
        return dict(with_numbers(document, PromptSource(path)))
    except ValueError as error:
        raise UpitError(f"{error}.") from None


def check_every_expert(numbers: Collection[int], num_experts: int, source: PromptSource) -> None:
    """Check that prompts are those of all experts there are.

    Without any, an expert would hardly ever be chosen: the gates know only what they were shown.

    Args:
        numbers: Of the experts that have some.
        source: Where the prompts are from.

    Raises:
        UpitError: naming the experts that are not there, or have none.
    """
    if over := [number for number in sorted(numbers) if number >= num_experts]:
        raise UpitError(
            f"{source} has expert {over[0]}, but the experts are numbered from 0 to "
            f"{num_experts - 1}; correct its number."
        )
    if without := [str(number) for number in range(num_experts) if number not in numbers]:
        raise UpitError(
            f"{source} has none for expert(s) {', '.join(without)} of {num_experts}, which "
            "the gates would not choose; write some for each, or use data."
        )
