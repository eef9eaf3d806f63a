"""Writes the reference pages of this folder: `python docs/generate.py` after a setting changes.

Pages of settings are made from the pydantic models, the page of commands from click, so that what
a reader finds is what the program takes. A test compares the pages with the program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from textwrap import indent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from upit_merge.cli.main import main
from upit_merge.cli.options import Command
from upit_merge.config.recipe import Recipe
from upit_merge.models.families import FAMILIES, REFUSED
from upit_merge.models.formats import FORMATS
from upit_merge.pipeline.config import PipelineConfig

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py: change the descriptions in the program instead. -->"


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


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


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


SETTINGS = {
    "recipe.md": SettingsPage(
        Recipe,
        "The recipe",
        "A recipe is one YAML file, of the form that mergekit reads. `upit-merge plan recipe.yml` "
        "checks it and writes nothing. Each block below has its keys, then an example of it at "
        "its place. Whole recipes are in [recipes/](../recipes/README.md), formulas in "
        "[method.md](method.md).",
    ),
    "pipeline.md": SettingsPage(
        PipelineConfig,
        "The pipeline",
        "`upit-merge pipeline pipeline.yml` goes from a dense model to a trained mixture: it "
        "fine-tunes, merges, fits the router, trains the mixture and evaluates it. Stages that are "
        "done are skipped, one that was cut off goes on. `merge` and `router` are blocks of "
        "[a recipe](recipe.md); `prepare` and `post_train` have the keys of `upit-merge finetune`, "
        "which are those of TRL's `trl sft --config` and three more "
        "([use-anywhere.md](use-anywhere.md#train-it-further)); without a GPU, see "
        "[hardware.md](hardware.md#training-without-a-gpu).",
    ),
}


def settings_pages() -> dict[str, str]:
    """Write every page of settings; a model is described on the first one it occurs on."""
    texts: dict[str, str] = {}
    known: dict[type[BaseModel], str] = {}
    for name, page in SETTINGS.items():
        texts[name] = page.text(known)
        known = {block.model: f"{name}{block.link}" for block in blocks_of(page.model)} | known
    return texts


def commands_page() -> str:
    """Describe every command with its arguments and options."""
    introduction = (
        "`upit-merge COMMAND --help` prints the same. The options of mergekit that several "
        "commands take are [at the end](#options-of-mergekit); those that can have no effect are "
        "accepted and say so."
    )
    parts = [NOTE, "# Commands", introduction]
    shared: dict[str, click.Option] = {}
    for name in main.list_commands(click.Context(main)):
        command = main.commands[name]
        assert isinstance(command, Command)
        context = click.Context(command, info_name=f"upit-merge {name}")
        params = [p for p in command.get_params(context) if "--help" not in p.opts]
        mergekit = {str(option.name): option for option in command.merge_options()}
        shared |= {key: option for key, option in mergekit.items() if not option.hidden}
        params = [param for param in params if param.name not in mergekit]
        options = [p for p in params if isinstance(p, click.Option)]
        usage = " ".join(["upit-merge", name, *command.collect_usage_pieces(context)])
        parts += [f"## upit-merge {name}", f"`{usage}`", cleandoc(command.help or "")]
        if mergekit:
            parts.append("Also takes [mergekit's options](#options-of-mergekit).")
        parts.append(table(["option", "value", "default", ""], list(map(option_row, options))))
        if command.epilog:
            parts.append(f"```\n{command.epilog}\n```")
    rows = [option_row(shared[name], mergekit=True) for name in sorted(shared)]
    parts += ["## Options of mergekit", table(["option", "value", "default", ""], rows)]
    return "\n\n".join(parts) + "\n"


def option_row(option: click.Option, *, mergekit: bool = False) -> list[str]:
    """Return spelling, kind of value, default and help."""
    spelling = ", ".join(f"`{word}`" for word in [*option.opts, *option.secondary_opts])
    value = ""
    if not option.is_flag:
        value = {"integer": "whole number"}.get(option.type.name, option.type.name)
        if isinstance(option.type, click.Choice):
            value = ", ".join(f"`{word}`" for word in option.type.choices)
        elif isinstance(option.type, click.IntRange):
            value = "whole number"
    default = ""
    if option.required:
        default = "*required*"
    elif option.secondary_opts:
        default = f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    elif not option.is_flag and isinstance(option.default, (str, int, float)):
        default = f"`{option.default}`"
    text = option.help or ""
    if found := re.search(r"\s*\[default: ([^]]*)\]$", text):  # of a block that may not be wanted
        text, default = text[: found.start()], f"`{found[1]}`"
    own = _MERGEKIT.get(str(option.name), text) if mergekit else text
    return [spelling, value, default, own or _OWN.get(str(option.name), "")]


# Options whose name says it all on the command line.
_OWN = {
    "seed": "Of whatever is random.",
    "max_shard_bytes": "Largest size of an output file, in bytes, such as 500M.",
}
# What mergekit's options do here.
_MERGEKIT = {
    "random_seed": "Instead of the recipe's seed.",
    "out_shard_size": "Largest size of an output file, in bytes, such as 500M or 5B.",
    "copy_tokenizer": "Whether the output gets a tokenizer.",
    "cuda": "Compute on the GPU; `--device cuda` says the same.",
    "device": "Where to compute: cpu, cuda, cuda:1, auto.",
    "gpu_rich": "mergekit's short form of several options; here it means `--cuda --multi-gpu`.",
    "lazy_unpickle": "Accept checkpoints in .bin files, which are unpickled tensor by tensor.",
    "multi_gpu": "Share the work among all GPUs.",
    "num_threads": "Threads for arithmetic on the CPU.",
    "quiet": "No progress bars, no tables.",
    "safe_serialization": "Safetensors, which is all that is written.",
    "transformers_cache": "Where models from the Hub are kept.",
    "trust_remote_code": "Run code that comes with a tokenizer.",
    "verbosity": "Log more; repeat it for still more.",
    "write_model_card": "Whether the output gets a README.md.",
}


_FAMILIES = """
The experts of a mixture are FFNs; all else of it is a dense model's. So a dense model becomes a
mixture exactly where some published format has the same attention, norms and multipliers: n equal
experts then compute what the model did, to rounding, and the tests compare that for every row here.
`architecture: auto` takes the first format of a row; `upit-merge plan` says which programs run it and
what else could be chosen. A recipe for each family is in [recipes/families](../recipes/families).

TABLE
What to know:

* `granitemoe` made of models with attention biases (Qwen2.5) is for llama.cpp: vLLM drops the biases.
* `glm4_moe` and `lfm2_moe` weigh experts by sigmoids. An LFM2-MoE adds 1e-6 to their sum, so very
  negative logits of a gate would weaken its experts: gates are made with logits of about 1.
* `granitemoe_swa` made of a SmolLM3 has a window as long as its context in the layers with a rotary
  embedding: if you raise `max_position_embeddings` afterwards, raise `sliding_window` with it.
* `flex_olmo`'s gates see the residual stream itself, without a norm.
* Of a mixture in Mixtral's format made of a Phi-3, only transformers is sure to honour a sliding window.
* A Ministral 3's context ends at `original_max_position_embeddings`, beyond which it scales queries.

`parameters.shared` adds an expert that every token passes. `zero` is none in effect, for formats that
must have one. `split` halves the neurons: an FFN is the sum of what its halves give, so one half may
always run (`shared_from` says of whom) and the other be routed, and equal experts stay exact.
`parameters.dense_layers: N` leaves the first N layers as they are.

## What is refused

A format without a place for something would compute other tokens, often without a word. Such models
are refused in one sentence with the reason, those of these types:

TABLE
Settings are refused in the same way where no format that the family has can express them: `mlp_bias`
and `use_bias` (experts have no biases), a bias of attention's output for `glm4_moe`, windows in some
layers only, and a partial rotary embedding for `mixtral`. What is a mixture already is no dense model.
"""


def notebook() -> str:
    """Turn colab.sh into a Jupyter notebook without outputs: its blocks as cells of bash."""
    cells: list[dict[str, Any]] = []
    text = (FOLDER / "colab.sh").read_text(encoding="utf-8")
    for block in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = block.partition("\n")
        cell: dict[str, Any] = {"metadata": {}}
        if kind.strip() == "[markdown]":
            cell["cell_type"] = "markdown"
            body = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            body = f"%%bash\nset -euo pipefail\n{body.strip()}"
        cells.append({**cell, "id": f"cell-{len(cells)}", "source": body.splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def families_page() -> str:
    """Return the page of dense families, the formats they become, and what is refused."""
    intro, options, refused = cleandoc(_FAMILIES).split("TABLE\n")
    lines = [f"# Families and formats\n\n{NOTE}\n\n{intro}"]
    lines.append("| dense models | `model_type` | become (`architecture:`) |\n|---|---|---|")
    for family in dict.fromkeys(FAMILIES.values()):
        targets = ", ".join(f"`{target}`" for target in family.targets)
        names = ", ".join(f"`{name}`" for name, other in FAMILIES.items() if other is family)
        lines.append(f"| {family.title} | {names} | {targets} |")
    lines.append("\n| format | run by | `shared` | `dense_layers` |\n|---|---|---|---|")
    for name, form in FORMATS.items():
        readers = [f"{who} ({note})" if note else who for who, note in form.readers.items()]
        dense = "yes" if form.has_dense_layers else "no"
        kinds = ", ".join(form.shared)
        lines.append(f"| {form.title}, `{name}` | {', '.join(readers)} | {kinds} | {dense} |")
    lines.append(f"\n{options}")
    lines.append("| `model_type` | why |\n|---|---|")
    lines += [f"| `{name}` | {reason} |" for name, reason in REFUSED.items()]
    return "\n".join([*lines, f"\n{refused.strip()}", ""])


def pages() -> dict[str, str]:
    """Return every generated file of this folder, by name."""
    return {
        **settings_pages(),
        "commands.md": commands_page(),
        "families.md": families_page(),
        "colab.ipynb": notebook(),
    }


if __name__ == "__main__":
    for page_name, page_text in pages().items():
        (FOLDER / page_name).write_text(page_text, encoding="utf-8")
