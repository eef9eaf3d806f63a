"""Chat templates: those a model has, those a recipe means, those another model can lend."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError, shown
from upit_merge.io.sources import DenseModel
from upit_merge.io.untrusted import TEMPLATE_FOLDER, is_file_name, own_file, read_json
from upit_merge.models.tokenizer import added_tokens, has_tokenizer, vocabulary

LOG = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
DEFAULT = "default"
# How tokens of chat formats are spelled that no text would have.
_TOKEN = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True)
class Borrowed:
    """Chat templates of another model, for a tokenizer that has none.

    Attributes:
        owner: The label of the model they are of.
        templates: By name; empty if they do not fit.
        unknown: A token they write that the tokenizer lacks; None if they fit.
    """

    owner: str
    templates: Mapping[str, str]
    unknown: str | None = None


def chat_templates(folder: Path) -> dict[str, str]:
    """Return a model's chat templates by name, as transformers finds them.

    Files of their own come before what `tokenizer_config.json` has.

    Raises:
        UpitError: one is a link out of the folder.
    """
    paths = {DEFAULT: folder / TEMPLATE_FILE}
    paths |= {path.stem: path for path in template_files(folder)}
    found = {
        name: path.read_text(encoding="utf-8", errors="replace")
        for name, path in paths.items()
        if path.is_file()
    }
    return found or _configured(tokenizer_config(folder).get("chat_template"))


def _configured(entry: Any) -> dict[str, str]:
    if isinstance(entry, str):
        return {DEFAULT: entry}
    if isinstance(entry, list):  # as transformers 4 wrote several
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
    if not isinstance(entry, dict):
        return {}
    # Each may become the name of a file.
    named = {name: text for name, text in entry.items() if is_file_name(name)}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def template_files(folder: Path) -> list[Path]:
    """Return the files of a model's named chat templates.

    Raises:
        UpitError: one is a link out of the folder, which would be copied from there.
    """
    paths = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [own_file(path, folder) for path in paths if path.is_file() and is_file_name(path.name)]


def own_template(folder: Path) -> str | None:
    """Return the chat template in a model's folder that is used if none is named."""
    return chat_templates(folder).get(DEFAULT)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `tokenizer_config.json`; {} if there is none to read."""
    try:
        return read_json(folder / CONFIG_FILE, "the tokenizer")
    except UpitError:
        return {}


def resolve_chat_template(setting: str, models: Sequence[DenseModel]) -> str | None:
    """Return the Jinja text a recipe's `chat_template` means.

    Args:
        setting: A template, the name of one that mergekit ships, or `auto`: the one most of the
            models have.

    Raises:
        UpitError: it is neither.
    """
    if "{" in setting:
        return setting
    if setting == "auto":
        found = [text for model in models if (text := own_template(model.folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    shipped = resources.files("mergekit._data.chat_templates")
    names = sorted(p.name.removesuffix(".jinja") for p in shipped.iterdir() if ".jinja" in p.name)
    if setting not in names:
        raise UpitError(
            f"chat_template: {shown(setting)} is neither a Jinja template nor one of mergekit's "
            f"({', '.join(names)}); use one of these."
        )
    return shipped.joinpath(f"{setting}.jinja").read_text(encoding="utf-8")


def borrowed_templates(donor: DenseModel, others: Sequence[DenseModel]) -> Borrowed | None:
    """Return another model's chat templates if the tokenizer's donor has none.

    They fit if every special token that they write is one of the tokenizer's.

    Args:
        others: In the order in which they are asked.

    Returns:
        None if the donor has some, or nobody has. Without templates if none fit.
    """
    if chat_templates(donor.folder):
        return None
    unfit = None
    known = None
    for model in others:
        templates = chat_templates(model.folder)
        if not templates:
            continue
        known = vocabulary(donor.folder) if known is None else known
        text = "".join(templates.values())
        tokens = added_tokens(model.folder)
        if not has_tokenizer(model.folder):
            # Its vocabulary is lost, but not what its tokens are called.
            tokens = [*_settings_tokens(model.folder), *_TOKEN.findall(text)]
        unknown = [t for t in tokens if t and t in text and t not in known]
        if not unknown:
            return Borrowed(model.label, templates)
        unfit = unfit or Borrowed(model.label, {}, unknown[0])
    return unfit


def _settings_tokens(folder: Path) -> list[str]:
    """Return the added tokens that a tokenizer's settings name."""
    added = tokenizer_config(folder).get("added_tokens_decoder")
    entries = added.values() if isinstance(added, Mapping) else ()
    texts = (entry.get("content") for entry in entries if isinstance(entry, Mapping))
    return [text for text in texts if isinstance(text, str)]


def lend_templates(donor: DenseModel, borrowed: Borrowed, folder: Path) -> None:
    """Give the donor's tokenizer in `folder` the borrowed chat templates if they fit; says so."""
    if borrowed.templates:
        write_chat_templates(borrowed.templates, folder)
        LOG.warning(
            "The tokenizer of %s has no chat template; the output gets that of %s.",
            donor.label,
            borrowed.owner,
        )
    else:
        LOG.warning(
            "The tokenizer of %s has no chat template, and that of %s does not fit, as it writes "
            "%s, which is none of its tokens; set chat_template in the recipe.",
            donor.label,
            borrowed.owner,
            shown(borrowed.unknown),
        )


def write_chat_templates(templates: Mapping[str, str], folder: Path) -> None:
    """Make `templates` the only chat templates of the tokenizer in `folder`.

    The default one goes where transformers 5 looks (`chat_template.jinja`) and where older
    readers and llama.cpp do (`tokenizer_config.json`).

    Args:
        templates: By name; names are those of files.
    """
    shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    for name, template in templates.items():
        path = folder / TEMPLATE_FOLDER / f"{name}.jinja"
        if name == DEFAULT:
            path = folder / TEMPLATE_FILE
            config = tokenizer_config(folder) | {"chat_template": template}
            write_loosely(folder / CONFIG_FILE, config)
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8", errors="replace")


def write_loosely(path: Path, settings: Mapping[str, Any]) -> None:
    """Write somebody's settings as JSON, whatever text is in them."""
    path.write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        # JSON may hold half a character, which UTF-8 cannot; in JSON it can be escaped again.
        errors="backslashreplace",
    )
