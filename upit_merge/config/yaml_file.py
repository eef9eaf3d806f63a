"""YAML that people write: recipes and configurations, read with care."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from upit_merge.errors import UpitError, first_line, one_line

_MAX_CHARACTERS = 250_000  # a recipe is a page of text
_MAX_MERGED = 10_000  # keys that come by `<<`
_MERGE_TAG = "tag:yaml.org,2002:merge"
_VALUE_TAG = "tag:yaml.org,2002:value"


def read_yaml_text(path: Path, what: str) -> str:
    """Read the text of a file, as far as a recipe may be long.

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

    Merge keys (`<<`) are resolved here, too. PyYAML copies whatever they name, and what that names
    in turn, without end; and which of several sources wins depends on its version (6.0.4).
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0
        self._open: set[int] = set()  # ids of the mappings whose merge keys are being resolved

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refusal(key, f"the key {key.value} is given twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace the merge keys of a mapping by what they name, as YAML's merge draft has it.

        A mapping's own keys win over merged ones, and the first of several sources over the later.
        The mapping is built from its pairs in order, the last of equal keys stays: what wins
        follows what it overrides.

        Raises:
            ConstructorError: what is merged is no mapping, merges itself, or is too much.
        """
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own: list[tuple[yaml.Node, yaml.Node]] = []
        self._open.add(id(node))
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                for source in reversed(_merge_sources(value)):
                    merged += self._merged_pairs(key, source)
                continue
            if key.tag == _VALUE_TAG:  # a plain `=`, which is text
                key.tag = "tag:yaml.org,2002:str"
            own.append((key, value))
        self._open.remove(id(node))
        node.value = merged + own

    def _merged_pairs(
        self, key: yaml.Node, source: yaml.MappingNode
    ) -> list[tuple[yaml.Node, yaml.Node]]:
        if id(source) in self._open:
            raise _refusal(key, "a mapping merges (`<<`) itself")
        self.flatten_mapping(source)
        pairs: list[tuple[yaml.Node, yaml.Node]] = source.value
        self._merged += len(pairs)
        if self._merged > _MAX_MERGED:
            raise _refusal(key, "merge keys (`<<`) copy too much")
        return pairs


def _merge_sources(value: yaml.Node) -> list[yaml.MappingNode]:
    sources: list[Any] = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for source in sources:
        if not isinstance(source, yaml.MappingNode):
            found = "a list" if isinstance(source, yaml.SequenceNode) else "a single value"
            raise _refusal(source, f"`<<` takes a mapping or a list of mappings, not {found}")
    return sources


def _refusal(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text.

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
