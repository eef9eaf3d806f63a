"""The text of a new recipe: YAML that says of every line what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from upit_merge.errors import one_line

_NO_DATA = """\
# Without seed data the gates of the router are random, and tokens go to any expert. With samples of
# the training data, take the # away from the two lines below; or train the gates later, by
# `upit-merge router {out} --data seed.jsonl`.
# router:
#   data: ./seed.jsonl
"""


@dataclass(frozen=True)
class Draft:
    """What a recipe says.

    Attributes:
        base, base_told: The model before the fine-tuning, and how that is known.
        dtype: Of the output; None leaves it to the program.
        data: Seed data; None leaves the router out.
        entries: Of `models:`.
        description: What they are.
        count: Checkpoints that they come to.
        num_experts: Of the output.
        experts_per_token: Of the output; None leaves it to be chosen on the data.
        average: Attention and the rest are the checkpoints' mean, which were trained apart.
    """

    base: str
    base_told: str
    entries: Sequence[str]
    description: str
    count: int
    num_experts: int
    experts_per_token: int | None
    average: bool
    dtype: str | None
    data: str | None

    def text(self, commands: Sequence[str], out: str) -> str:
        """Write it.

        Args:
            commands: Lines that say what to do with it.
            out: The folder that these write, as on a command line.
        """
        told = f" ({one_line(self.base_told)})" if self.base_told else ""
        lines = ["# Written by `upit-merge init`. What else it may say: docs/recipe.md.", "#"]
        lines += [f"#   {one_line(command)}" for command in commands]
        lines += ["merge_method: upit", ""]
        lines += ["# The model before the fine-tuning, against which checkpoints are measured"]
        lines[-1] += f"{told}."
        lines += [f"base_model: {quoted(self.base)}", ""]
        lines += [f"# What becomes experts: {one_line(self.description)}, in order.", "models:"]
        lines += [f"  - model: {quoted(entry)}" for entry in self.entries]
        lines += ["", *self._dtype_lines(), "", "parameters:", *self._parameter_lines(), ""]
        if self.data is None:
            return "\n".join(lines) + "\n" + _NO_DATA.format(out=out)
        lines += [
            "# The router is fitted to samples of this: text, messages, prompt and completion, …",
            "router:",
            f"  data: {quoted(self.data)}",
        ]
        return "\n".join(lines) + "\n"

    def _dtype_lines(self) -> list[str]:
        if self.dtype is None:
            return ["# Of the output; the base's, if it is not given.", "# dtype: bfloat16"]
        advice = "bfloat16 would take half the room. " if self.dtype == "float32" else ""
        return [f"# Of the output; the checkpoints'. {advice}".rstrip(), f"dtype: {self.dtype}"]

    def _parameter_lines(self) -> list[str]:
        grown = self.num_experts - self.count
        if grown > 0:
            made = f"the checkpoints, and {grown} grown from them"
        elif grown < 0:
            made = "the last checkpoints; `select:` chooses others"
        else:
            made = "the checkpoints"
        lines = [
            f"  # Experts in every layer: {made}.",
            f"  num_experts: {self.num_experts}",
        ]
        if self.experts_per_token is None:
            lines += [
                "  # Experts that compute a token: 2, or 1 if that is better on samples of the data.",
                "  # Take the # away if you will train the mixture further: with 1 its gates learn",
                "  # nothing more.",
                "  # experts_per_token: 2",
            ]
        else:
            lines += [
                "  # Experts that compute a token: what it costs, and how much they may mix.",
                f"  experts_per_token: {self.experts_per_token}",
            ]
        if grown > 0:
            lines += [
                "  # Share of a checkpoint's difference to the base that a grown expert keeps.",
                "  density: 0.9",
            ]
        if self.average:
            lines += [
                "  # Attention, norms and embeddings, which all experts share: the mean of models",
                "  # that were trained apart.",
                "  backbone: average",
            ]
        return [*lines, "  # Of everything random.", "  seed: 42"]


def quoted(value: str) -> str:
    """Return a text as YAML reads it back, on one line."""
    breaks = value.splitlines() not in ([], [value])  # which only double quotes keep on a line
    style = '"' if breaks else None
    text = yaml.safe_dump(value, allow_unicode=not breaks, width=1_000_000, default_style=style)
    return str(text).splitlines()[0]
