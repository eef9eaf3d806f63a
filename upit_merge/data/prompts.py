"""Prompts that a recipe lists for its experts, as seed examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upit_merge.data.records import SeedExample, to_example


def prompt_examples(prompts: Mapping[int, Sequence[str | Sequence[Any]]]) -> list[SeedExample]:
    """Return an example for each prompt, whose label is its expert.

    Args:
        prompts: By expert: texts, or lists of messages, which the chat template will be applied to.

    Raises:
        UpitError: a list is no conversation.
    """
    return [
        replace(to_example(_record(prompt), f"router.prompts.{expert} no. {number}"), label=expert)
        for expert, listed in sorted(prompts.items())
        for number, prompt in enumerate(listed, 1)
    ]


def _record(prompt: str | Sequence[Any]) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
