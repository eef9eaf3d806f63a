"""Prompts that are listed for experts, as seed examples; and what messages call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upit_merge.data.records import SeedExample, to_example


@dataclass(frozen=True)
class PromptSource:
    """Where prompts are written, so that messages can say it.

    Attributes:
        file: The file that holds nothing else; None of those in a recipe.
    """

    file: Path | None = None

    def __str__(self) -> str:
        return "router.prompts" if self.file is None else str(self.file)

    def of(self, expert: int) -> str:
        """Return what the prompts of one expert are called."""
        return f"{self}.{expert}" if self.file is None else f"{self}: expert {expert}"


def prompt_examples(
    prompts: Mapping[int, Sequence[str | Sequence[Any]]], source: PromptSource
) -> list[SeedExample]:
    """Return an example for each prompt, whose label is its expert.

    Args:
        prompts: By expert: texts, or lists of messages, which the chat template will be applied to.
        source: Where they are from.

    Raises:
        UpitError: a list is no conversation.
    """
    return [
        replace(to_example(_record(prompt), f"{source.of(expert)} no. {number}"), label=expert)
        for expert, listed in sorted(prompts.items())
        for number, prompt in enumerate(listed, 1)
    ]


def _record(prompt: str | Sequence[Any]) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
