"""YAML that people write: recipes and configurations, read with care."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from upit_merge.errors import UpitError, first_line, one_line

_MAX_CHARACTERS = 250_000  # a recipe is a page of text
_MAX_MERGED = 10_000  # keys that come by `<<`


def read_yaml_text(path: Path, what: str) -> str:
    """The text of a file.

    Args:
        what: What the file is, for messages.

    Raises:
        UpitError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise UpitError(f"The {what} {path} does not exist; correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UpitError(f"The {what} {path} cannot be read ({error}); check the file.") from None


def load_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a file that must hold a mapping with names for keys.

    Raises:
        UpitError: it cannot be read, or is something else.
    """
    document = parse_yaml(read_yaml_text(path, what), str(path))
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UpitError(f"The {what} {path} is not a YAML mapping of names to values; correct it.")
    return document


class _CarefulLoader(yaml.SafeLoader):
    """The safe loader, which would silently let the last of two equal keys win.

    It would also copy whatever merge keys (`<<`) name, and what those name in turn, without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(source, yaml.MappingNode):
                        self.flatten_mapping(source)
                        self._merged += len(source.value)
                    if self._merged > _MAX_MERGED:
                        problem = "merge keys (`<<`) copy too much"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        super().flatten_mapping(node)


def parse_yaml(text: str, source: str) -> Any:
    """What YAML text says.

    Args:
        source: How to call it in messages, e.g. its path.

    Raises:
        UpitError: it is not YAML, names a key twice, or is too long.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UpitError(
            f"{source} has more than {_MAX_CHARACTERS:,} characters; give a recipe, such as "
            "recipes/upit-8x.yml."
        )
    try:
        return yaml.load(text, Loader=_CarefulLoader)
    except Exception as error:  # a wrong date or tag makes PyYAML raise whatever comes up
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = [getattr(error, name, None) for name in ("context", "problem", "reason")]
        problem = ", ".join(map(str, filter(None, told))) or first_line(error)
        if not isinstance(error, (yaml.YAMLError, ValueError, RecursionError)):
            problem = "a value does not fit its tag"
        raise UpitError(
            f"{source} is not valid YAML ({where}{one_line(problem)}); correct the file."
        ) from None
