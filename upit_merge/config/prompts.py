"""`router.prompts`: a few lines for each expert, in a recipe or in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, StrictStr

from upit_merge.config.explain import check_yaml_size
from upit_merge.config.yaml_file import parse_yaml, read_yaml_text
from upit_merge.errors import UpitError, shown
from upit_merge.io.untrusted import read_json


def _with_numbers(value: Any) -> Any:
    """Read the experts' numbers where they are texts, as all keys in JSON are."""
    if not isinstance(value, Mapping):
        return value
    found: dict[Any, Any] = {}
    for key, listed in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 9 else key
        if type(number) is not int or number < 0:
            raise ValueError(
                f"router.prompts has the key {shown(key)}, expected an expert's number, from 0"
            )
        if number in found:
            raise ValueError(f"router.prompts has expert {number} twice; put its prompts together")
        found[number] = listed
    if not found:
        raise ValueError("router.prompts is empty; write a few lines for each expert")
    for number, listed in found.items():
        if not isinstance(listed, list) or not listed:
            raise ValueError(
                f"router.prompts.{number} is {shown(listed)}, expected a list of prompts, at least "
                "one"
            )
        for prompt in listed:
            if not prompt or not isinstance(prompt, str | list) or not _is_said(prompt):
                raise ValueError(
                    f"router.prompts.{number} holds {shown(prompt)}, expected a text, or a list of "
                    "{role, content}"
                )
    return found


def _is_said(prompt: str | list[Any]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return all(isinstance(message, dict) for message in prompt)


Prompts = Annotated[
    dict[Annotated[StrictInt, Field(ge=0)], list[StrictStr | list[dict[str, Any]]]],
    BeforeValidator(_with_numbers),
]


def load_prompts(path: Path) -> dict[Any, Any]:
    """Read prompts from a file, YAML or (`.json`) JSON, for settings to check.

    Raises:
        UpitError: it cannot be read, or is no mapping.
    """
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise UpitError(f"The file of prompts {path} does not exist; correct the path.")
        document: Any = read_json(path, "file of prompts")
    else:
        document = parse_yaml(read_yaml_text(path, "file of prompts"), str(path))
    check_yaml_size(document, str(path))
    if not isinstance(document, Mapping):
        raise UpitError(
            f"{path} is not a mapping of experts' numbers to lists of prompts; write "
            "`0: [a prompt, another]` and so on."
        )
    return dict(document)


def check_every_expert(prompts: Mapping[int, Any], num_experts: int) -> None:
    """Check that the prompts are those of all experts there are.

    Without any, an expert would hardly ever be chosen: the gates know only what they were shown.

    Raises:
        UpitError: naming the experts that are not there, or have none.
    """
    if over := [number for number in sorted(prompts) if number >= num_experts]:
        raise UpitError(
            f"router.prompts has expert {over[0]}, but the experts are numbered from 0 to "
            f"{num_experts - 1}; correct its number."
        )
    if without := [str(number) for number in range(num_experts) if number not in prompts]:
        raise UpitError(
            f"router.prompts has none for expert(s) {', '.join(without)} of {num_experts}, which "
            "the gates would not choose; write some for each, or use data."
        )
