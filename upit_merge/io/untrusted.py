"""What protects a user from files made by strangers; `SECURITY.md` says from what.

Here is what every reader shares: where a file of a model's folder may lie, how much JSON is read,
which names of files and tensors are taken. What only one reader needs stays beside it:

* `errors.py`: `UpitError`, `one_line`, `shown`: text of a file inside a message: one line, no
  control characters, not too long;
* `io/safetensors_file.py`: headers that promise more than the file holds, or shapes without end;
* `io/pickle_file.py`: pickles of nothing but tensors, unpickled with `weights_only`;
* `io/checkpoint.py`: pickles only if the user allows them, every tensor the index promises;
* `io/trainer_state.py`: notes of a trainer, of which only numbers are taken, and none is needed;
* `io/leavings.py`: folders of other programs, of which only names are looked at;
* `io/hub.py`: which files are downloaded: code and pickles only if the user allows them;
* `config/yaml_file.py`, `config/explain.py`: YAML without tags that run code, aliases and merge
  keys that grow without end, keys given twice, numbers too long to print;
* `config/prompts.py`, `config/mergekit_moe.py`: prompts and settings of the wrong kind, read as the
  YAML and JSON above;
* `config/fields.py`: names without control characters;
* `models/dense.py`: `check_counts`: counts that a `config.json` promises and the tensors do not keep;
* `models/published.py`: fused tensors of shapes that are no experts';
* `models/lora/config.py`: patterns that would take for ever to match;
* `models/tokenizer.py`: `load_tokenizer`: a tokenizer's code only if the user allows it;
* `errors.py`: `printable`, `report/spoken.py`: what a model says, on the terminal;
* `commands/dialogue/voices.py`: a model's code only if the user allows it, and all of its weights;
* `models/chat_template.py`: `chat_templates`, `template_files`: names that are files in one folder;
* `data/examples.py`, `data/records.py`, `data/conversations.py`: records of the wrong kind, text
  that is no Unicode, settings that are not the data's business;
* `data/json_text.py`: keys that stand twice, numbers that no float holds;
* `commands/measured.py`: `kept`: numbers in files that were damaged, or are another version's;
* `commands/first_recipe/survey.py`: folders without end, links out of them, hints of the wrong kind;
* `output/staging.py`, `output/lock.py`: what an earlier report, or a run that was cut off, wants
  removed, and links among our hidden files;
* `report/document.py`, `report/sources.py`, `report/markdown.py`: reports of the wrong kind, cards of
  other models, text of others in ours.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError, one_line, shown

# The one folder inside a model's that we read and write: transformers' chat templates with names.
TEMPLATE_FOLDER = "additional_chat_templates"
# Of the files of a model folder, those that we, transformers or mergekit read, besides weights.
_SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.md",
    "*.model",
    "*.py",
    "*.tiktoken",
    "*.txt",
    TEMPLATE_FOLDER,
    f"{TEMPLATE_FOLDER}/*",
)
_MAX_JSON_BYTES = 100_000_000  # as the safetensors library has it for headers
_MAX_FILE_NAME = 255
_MAX_TENSOR_NAME = 500  # characters; real ones stay below 100


def read_json(path: Path, what: str, *, by_hand: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        what: Whose file it is, for messages.
        by_hand: People write it: a key given twice is a mistake, and any is theirs to correct.

    Raises:
        UpitError: the file is missing, huge or not a JSON object, or as `own_file`.
    """
    remedy = "correct the file" if by_hand else "copy or download it again"
    own_file(path, path.parent)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UpitError(f"{path} is too large for JSON of a model; copy or download it again.")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_each_once if by_hand else None)
    except FileNotFoundError:
        raise UpitError(
            f"{what[0].upper()}{what[1:]} has no {path.name} in {path.parent}; give the folder of "
            "a complete Hugging Face checkpoint."
        ) from None
    except OSError as error:
        raise UpitError(f"{path} cannot be read ({error.strerror}); check the file.") from None
    except (ValueError, RecursionError) as error:
        raise UpitError(f"{path} is not valid JSON ({error}); {remedy}.") from None
    if not isinstance(content, dict):
        raise UpitError(f"{path} is not a JSON object; {remedy}.")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, of which the last of equal keys would silently win.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def own_file(path: Path, folder: Path) -> Path:
    """Return `path`, once it is sure that reading it reads a file of the model folder `folder`.

    A folder from elsewhere may hold links to anything on this machine, which would end up in the
    output, and named pipes and devices, which never end. The folder itself may be a link. In the
    Hub's cache, files of `models--owner--name/snapshots/REVISION` are links into the model's
    `blobs`.

    Raises:
        UpitError: it is a link that leads out of the folder, or neither a file nor a folder.
    """
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        homes.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UpitError(
            f"{path} is a link to {one_line(target)}, outside its folder; copy the file there, or "
            "link the whole folder."
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UpitError(f"{path} is a pipe, socket or device, not a file; remove it.")
    return path


def check_own_files(label: str, folder: Path) -> None:
    """Check every small file of a model, whoever will read or copy it later.

    Raises:
        UpitError: the folder cannot be read, or as `own_file`.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UpitError(
            f"Checkpoint {label} cannot be read in {folder}; check the folder's rights."
        )
    for pattern in _SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            own_file(path, folder)


def check_no_links(path: Path) -> None:
    """Check a hidden file or folder of ours, in which files are written and removed.

    In a folder from elsewhere that would be done wherever a link leads.

    Raises:
        UpitError: it is a link, or there is one in it.
    """
    for inner in (path, *(() if path.is_symlink() else path.rglob("*"))):
        if inner.is_symlink():
            raise UpitError(f"{inner} is a link, which upit-merge never makes there; remove it.")


def is_file_name(name: object) -> bool:
    """Whether a value is the name of a file in its folder, and nowhere else, on any system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) <= _MAX_FILE_NAME
        and not _leads_elsewhere(name)
    )


def is_output_name(name: object) -> bool:
    """Whether a value names a file of an output: in its folder, or among its chat templates."""
    return isinstance(name, str) and is_file_name(name.removeprefix(f"{TEMPLATE_FOLDER}/"))


def check_file_name(source: Path, name: str) -> None:
    """Check the name of a file that an index gives.

    Args:
        source: The index.

    Raises:
        UpitError: it is a path that leads out of the folder, or no name at all.
    """
    # An index from the internet must not make us read anywhere else, on any system.
    if _leads_elsewhere(name):
        raise UpitError(
            f"{source} points outside its folder ({one_line(name)}); do not use this checkpoint."
        )
    if not (is_file_name(name) and name.isascii()):
        raise UpitError(f"{source} names {shown(name)} as a file; do not use this checkpoint.")


def _leads_elsewhere(name: str) -> bool:
    return re.search(r"[/\\:]", name) is not None or name in (".", "..")


def check_tensor_name(path: Path, name: object) -> None:
    """Check that a file's name of a tensor is one, so that every later message can quote it.

    Raises:
        UpitError: the name is not a short text of printable characters.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > _MAX_TENSOR_NAME:
        raise UpitError(
            f"{path} has a tensor named {shown(name)}, as no Llama or Mistral has; do not use this "
            "checkpoint."
        )
