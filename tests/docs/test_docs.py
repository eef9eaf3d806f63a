"""The documentation says what the program does: generated pages, examples, links, messages."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from tests.support.source_messages import source_messages
from upit_merge.cli.main import main
from upit_merge.config.recipe import FilteredDensity, Parameters, parse_recipe_text
from upit_merge.config.router import RouterSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


sys.path.append(str(DOCS))  # where the script finds what is beside it; `docs` is no package
generate = importlib.import_module("generate")
anchor = importlib.import_module("generate_markdown").anchor
MARKDOWN = sorted(
    path
    for folder in (".", "docs", "recipes", "benchmarks", "tests")
    for path in (ROOT / folder).glob("*.md")
)
_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


# ---- pages that are made from the program ----------------------------------------------------


PAGES = generate.pages()
# With the page that each is on.
BLOCKS = [
    pytest.param(name, block, id=f"{name} {block.title}")
    for name, page in generate.SETTINGS.items()
    for block in generate.blocks_of(page.model)
]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == PAGES[name], "run python docs/generate.py"


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_every_key_is_described(page: str, block: Any) -> None:
    for name, field in block.model.model_fields.items():
        assert field.description, f"{block.title}: {name} has no description"
        assert any(f"| `{name}` |" in text for text in PAGES.values())


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_every_block_has_an_example_that_is_valid(page: str, block: Any) -> None:
    assert block.example, f"give {block.model.__name__} an EXAMPLE, in YAML"
    kind = list[FilteredDensity] if block.model is FilteredDensity else block.model
    TypeAdapter(kind).validate_python(yaml.safe_load(block.example))
    # At its place in the page it is the same.
    placed = yaml.safe_load(block.placed_example())
    for part in block.path:
        placed = placed[0] if part == "[]" else placed[part]
    assert placed == yaml.safe_load(block.example)


class Inner(BaseModel):
    """What is inside."""

    share: float = 0.5


class Outer(BaseModel):
    """What is outside."""

    many: list[Inner]
    one: Inner | None = None


class Other(BaseModel):
    """What has the same inside."""

    inner: Inner | None = None


def test_a_model_that_several_keys_or_pages_share_is_described_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [block.title for block in generate.blocks_of(Outer)] == ["The top level", "`one`"]
    both = {
        "outer.md": generate.SettingsPage(Outer, "Outer", ""),
        "other.md": generate.SettingsPage(Other, "Other", ""),
    }
    monkeypatch.setattr(generate, "SETTINGS", both)
    texts = generate.settings_pages()
    assert "| `many` | list of [a mapping](#one) | *required* |" in texts["outer.md"]
    assert "| `share` | number | `0.5` |" in texts["outer.md"]
    assert "| `inner` | [a mapping](outer.md#one) |" in texts["other.md"]
    assert "`share`" not in texts["other.md"]


def test_every_command_is_described() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name, command in main.commands.items():
        assert f"## upit-merge {name}\n" in page
        for param in command.params:
            if param.opts[0].startswith("--"):
                assert f"`{param.opts[0]}`" in page


def words_in(annotation: Any) -> list[str]:
    """All words that a setting may be."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in words_in(part)]


@pytest.mark.parametrize("model", [Parameters, RouterSettings])
def test_the_method_is_described_for_every_choice(model: type[BaseModel]) -> None:
    page = (DOCS / "method.md").read_text(encoding="utf-8")
    for name, field in model.model_fields.items():
        for word in words_in(field.annotation):
            assert re.search(rf"[`{{ ]{word}[`}}]", page), f"{name}: {word}"


# ---- links -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Link:
    """From a page to a file of the repository, or to a heading in one."""

    page: Path
    target: str

    @property
    def problem(self) -> str | None:
        path, _, fragment = self.target.partition("#")
        found = (self.page.parent / path).resolve() if path else self.page
        if not found.exists() or not found.is_relative_to(ROOT):
            return f"{self.page.name}: {self.target} does not exist"
        if not fragment:
            return None
        if found.is_dir():  # GitHub shows its README
            found /= "README.md"
        if fragment not in anchors_of(found):
            return f"{self.page.name}: {self.target}: no such heading"
        return None


def anchors_of(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    found: set[str] = set()
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        name = anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        count = sum(known == name or known.startswith(f"{name}-") for known in found)
        found.add(f"{name}-{count}" if name in found else name)
    return found


def links_in(page: Path, text: str) -> list[Link]:
    plain = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", text))
    targets = re.findall(r"\]\(([^)\s]+)\)", plain)
    return [Link(page, t) for t in targets if not re.match(r"[a-z]+:", t)]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    found = links_in(page, page.read_text(encoding="utf-8"))
    assert [link.problem for link in found if link.problem] == []


def test_links_that_lead_nowhere_are_found() -> None:
    """The control of the test above."""
    page = DOCS / "recipe.md"
    found = links_in(page, "[a](nowhere.md) [b](#no-such) [c](#router) [d](https://example.org)")
    assert [bool(link.problem) for link in found] == [True, True, False]


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {
        link.target for link in links_in(ROOT / "README.md", (ROOT / "README.md").read_text())
    }
    for page in DOCS.glob("*.md"):
        assert any(target.startswith(f"docs/{page.name}") for target in linked), page.name


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 172


# ---- quoted messages, YAML, code ---------------------------------------------------------------


def is_message(quoted: str, template: str) -> bool:
    """Whether a text of the source, with `…` for what is filled in, says what is quoted."""
    if quoted.removesuffix("…") in template:
        return True
    pattern = pattern_of(template)
    return pattern is not None and pattern.fullmatch(quoted) is not None


@cache  # they are asked about every quotation
def pattern_of(template: str) -> re.Pattern[str] | None:
    parts = template.split("…")
    return re.compile(".+".join(map(re.escape, parts))) if len("".join(parts)) >= 20 else None


def test_quoted_messages_are_the_programs() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quoted) > 30
    templates = source_messages()
    assert [q for q in quoted if not any(is_message(q, t) for t in templates)] == []
    verdicts = re.findall(r"^\| `([A-Z][^`]+)`", (DOCS / "router.md").read_text(), re.MULTILINE)
    assert len(verdicts) > 3
    assert [v for v in verdicts if not any(is_message(v, t) for t in templates)] == []


def test_other_messages_would_be_noticed() -> None:
    """The control of the test above."""
    templates = source_messages()
    for invented in ("The recipe … is too long; shorten it.", "Checkpoint … is too old; train it."):
        assert not any(is_message(invented, template) for template in templates)


def code_blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_in_pages_is_valid(page: Path) -> None:
    for text in code_blocks(page, "python"):
        ast.parse(text)
    for text in code_blocks(page, "yaml"):
        document = yaml.safe_load(text)
        if "merge_method" in document:
            parse_recipe_text(text)


def test_the_settings_for_trl_are_known_to_it() -> None:
    trl = pytest.importorskip("trl")
    blocks = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
    known = {field.name for block in blocks for field in dataclasses.fields(block)}
    documents = map(yaml.safe_load, code_blocks(DOCS / "use-anywhere.md", "yaml"))
    [settings] = [document for document in documents if "model_name_or_path" in document]
    assert set(settings) <= known


COMMAND = re.compile(r"^(?:!)?upit-merge (\w+)(.*?)(?:#.*)?$", re.MULTILINE)


@pytest.mark.parametrize("path", [*MARKDOWN, DOCS / "colab.sh"], ids=lambda path: path.name)
def test_commands_in_pages_exist(path: Path) -> None:
    for name, rest in COMMAND.findall(path.read_text(encoding="utf-8")):
        if name == "finetune":  # takes TRL's keys as options; run below
            continue
        command = main.commands[name]
        known = {word for p in command.get_params(main.make_context("", [name])) for word in p.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)
