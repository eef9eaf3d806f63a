"""References of YAML documents, block by block, from the pydantic models that validate them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from generate_markdown import NOTE, anchor, table


@dataclass(frozen=True)
class Block:
    """A mapping in a YAML document.

    Attributes:
        path: The keys that lead to it; a list's entries are `[]`.
        model: What it is validated by.
    """

    path: tuple[str, ...]
    model: type[BaseModel]

    @property
    def title(self) -> str:
        words = "".join(part if part == "[]" else f".{part}" for part in self.path)
        return f"`{words.removeprefix('.')}`" if self.path else "The top level"

    @property
    def link(self) -> str:
        """To its heading, from the same page."""
        return f"#{anchor(self.title)}"

    @property
    def example(self) -> str:
        """YAML of the block alone."""
        return str(getattr(self.model, "EXAMPLE", ""))

    def placed_example(self) -> str:
        """Place the example below the keys that lead to it, as it stands in a document."""
        text = self.example.rstrip("\n")
        for part in reversed(self.path):
            if part == "[]":
                text = "- " + indent(text, "  ")[2:]
                continue
            joined = "\n" if "\n" in text or ": " in text else " "
            text = f"{part}:{joined}{indent(text, '  ')}"
        return text


def blocks_of(model: type[BaseModel]) -> list[Block]:
    """List a model and all models in it, depth first; one that several keys share at its shortest."""
    found: dict[type[BaseModel], Block] = {}

    def visit(inner: type[BaseModel], path: tuple[str, ...]) -> None:
        if inner in found and len(found[inner].path) <= len(path):
            return
        found.pop(inner, None)
        found[inner] = Block(path, inner)
        for name, field in inner.model_fields.items():
            for part, in_list in models_in(field.annotation):
                visit(part, (*path, name, *(["[]"] if in_list else [])))

    visit(model, ())
    return list(found.values())


def models_in(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield models that an annotation names, and whether as entries of a list, which come last."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_list
        return
    in_list = in_list or get_origin(annotation) is list
    found = [pair for part in get_args(annotation) for pair in models_in(part, in_list)]
    yield from sorted(found, key=lambda pair: pair[1])


# ---- types in words ------------------------------------------------------------------------


# Where the models of mappings are described.
Links = Mapping[type[BaseModel], str]
_NAMES = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def kind_of(annotation: Any, metadata: Sequence[Any], links: Links) -> str:
    """Say what a value may be, in words, with the limits of numbers."""
    words = list(dict.fromkeys(_kinds(annotation, metadata, links)))
    # A whole number is a number too: the same limits are said once.
    for limited in [word for word in words if word.startswith("whole number")]:
        if limited.removeprefix("whole ") in words:
            words.remove(limited)
    return " or ".join(words)


def _kinds(annotation: Any, metadata: Sequence[Any], links: Links) -> Iterator[str]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for item in parts[1:] for m in getattr(item, "metadata", [item])]
        yield from _kinds(parts[0], [*inner, *metadata], links)
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _kinds(part, metadata, links)
    elif origin is Literal:
        yield ", ".join(f"`{word}`" for word in parts)
    elif origin is list:
        yield f"list of {kind_of(parts[0], (), links).replace('number', 'numbers', 1)}"
    elif origin is dict and Any in parts:
        yield "mapping"
    elif origin is dict:
        key, value = (kind_of(part, (), links) for part in parts)
        yield f"mapping of {key} to {value}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield f"[a mapping]({links[annotation]})"
    elif annotation in (int, float):
        limits = {sign: getattr(m, sign) for m in metadata for sign in _SIGNS if hasattr(m, sign)}
        told = ", ".join(f"{_SIGNS[sign]} {_power(value)}" for sign, value in limits.items())
        yield f"{_NAMES[annotation]} {told}".strip()
    elif annotation is not NoneType:
        yield _NAMES[annotation]


def _power(value: float) -> str:
    """Write a large power of two as such."""
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if value == 2**exponent and exponent > 16 else f"{value}"


def default_of(field: FieldInfo) -> str:
    """Write the default as in YAML; empty where there is none."""
    if field.is_required():
        return "*required*"
    if field.default in (None, PydanticUndefined) or isinstance(field.default, BaseModel):
        return ""
    return f"`{yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]}`"


# ---- pages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SettingsPage:
    """The reference of one kind of YAML document.

    Attributes:
        model: What a whole document is validated by.
        title, introduction: What the page opens with.
    """

    model: type[BaseModel]
    title: str
    introduction: str

    def text(self, elsewhere: Mapping[type[BaseModel], str]) -> str:
        """Describe every key, block by block.

        Args:
            elsewhere: Where models of other pages are described, which are not described again.
        """
        blocks = [block for block in blocks_of(self.model) if block.model not in elsewhere]
        links = dict(elsewhere) | {block.model: block.link for block in blocks}
        parts = [NOTE, f"# {self.title}", self.introduction]
        for block in blocks:
            parts += [f"## {block.title}", (block.model.__doc__ or "").split("\n\n")[0]]
            rows = []
            for name, field in block.model.model_fields.items():
                kind = kind_of(field.annotation, field.metadata, links)
                rows.append([f"`{name}`", kind, default_of(field), field.description or ""])
            parts.append(table(["key", "type", "default", ""], rows))
            if block.example:
                parts.append(f"```yaml\n{block.placed_example()}\n```")
        return "\n\n".join(parts) + "\n"
