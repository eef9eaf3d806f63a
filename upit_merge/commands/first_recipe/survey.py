"""What lies in a folder: models, what is none yet, data; found without being told anything.

The folder may be anybody's: it is walked to a limit, links are not followed, and of what is read
every file is the folder's own.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upit_merge.config.yaml_file import parse_yaml
from upit_merge.data.examples import EXTENSIONS, iter_examples
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint, is_adapter
from upit_merge.io.hub import OpenOptions
from upit_merge.io.leavings import leaving_in
from upit_merge.io.untrusted import check_own_files, own_file
from upit_merge.models.dense import read_dense_config
from upit_merge.models.lora.config import CONFIG, read_adapter_config
from upit_merge.models.lora.tensors import open_weights
from upit_merge.output.staging import REPORT

LOG = logging.getLogger(__name__)

_MAX_DEPTH = 5
_MAX_ENTRIES = 20_000
_MAX_DATA_FILES = 50  # that are looked into
_MAX_DATA_BYTES = 64 << 20  # of JSON, which may be one list and is then read whole
_MAX_HINT_CHARACTERS = 20_000  # of a card, or a run's settings
_MAX_SETTINGS = 20  # files of them

# How trainers name a folder by its step.
_STEP = re.compile(r"(?:checkpoint|ckpt|step|global_step|iter|epoch)[-_]?(\d+)", re.IGNORECASE)
# What shows that a folder without weights was meant to be a checkpoint.
_TRACES = (CONFIG, "config.json", "optimizer.pt", "trainer_state.json", "training_args.bin")
# What is text, but no data.
_NO_DATA = re.compile(r"(requirements|licen[cs]e|readme|notice|constraints)", re.IGNORECASE)
# Tables in many files.
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")

# The names that data has, the best for a router first; what is to measure with comes last.
_NAMES = (r"seed", r"train", r"sft|instruct|data|sample|chat")
_HELD_OUT = re.compile(r"held[-_ ]?out|test|valid|eval|(^|[-_.])dev([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundModel:
    """A complete dense model or an adapter that can be opened.

    Attributes:
        reference: Its path as a recipe names it.
        step: By its name, if trainers name folders so.
        dtype: Of most of its weights.
        config: Its `config.json`; empty of an adapter.
        made_from: What it says it was trained from, if it says so.
        told_by: Which file says so.
    """

    reference: str
    folder: Path
    is_adapter: bool
    dtype: torch.dtype
    config: Mapping[str, Any]
    made_from: str | None = None
    told_by: str = ""

    @property
    def step(self) -> int | None:
        match = _STEP.fullmatch(self.folder.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class FoundData:
    """A file, or a folder of one table's files, whose first record can be read.

    Attributes:
        reference: Its path as a recipe names it.
        rank: By its name, see `_NAMES`; the lower the better for a router.
        depth: How far below the folder it lies.
    """

    reference: str
    rank: int
    depth: int

    @property
    def is_held_out(self) -> bool:
        return self.rank > len(_NAMES)


@dataclass
class Survey:
    """What lies in a folder.

    Attributes:
        models: In the order of their paths.
        data: The best for a router first.
        left_out: By path, what cannot be used and why: whole sentences.
        ggufs: Paths of files that are made to be run.
    """

    models: list[FoundModel] = field(default_factory=list)
    data: list[FoundData] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ggufs: list[str] = field(default_factory=list)


def survey_folder(folder: Path, options: OpenOptions) -> Survey:
    """Look for models and data in a folder and below.

    Raises:
        UpitError: it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UpitError(
            f"{folder} {what}; give the folder in which the checkpoints lie, or its parent."
        )
    walk = _Walk(folder, options)
    walk.visit(folder, 0)
    if walk.entries > _MAX_ENTRIES:
        LOG.warning(
            "%s holds more than %s files and folders, of which the first were looked at; give a "
            "folder closer to the checkpoints.",
            folder,
            f"{_MAX_ENTRIES:,}",
        )
    survey = walk.survey
    survey.data.sort(key=lambda data: (data.rank, data.depth, data.reference))
    return survey


def reference_in(folder: Path, path: Path) -> str:
    """Return how a recipe names a path in a folder: from where the commands are run, if it can."""
    if folder.is_absolute():
        path, here = Path(os.path.abspath(path)), Path.cwd()
        if not path.is_relative_to(here):
            return path.as_posix()
        path = path.relative_to(here)
    name = path.as_posix()
    return name if name.startswith(("./", "../", "~")) or name in (".", "..") else f"./{name}"


class _Walk:
    """One look through a folder."""

    def __init__(self, folder: Path, options: OpenOptions) -> None:
        self.folder = folder
        self.options = options
        self.survey = Survey()
        self.entries = 0
        self._peeked = 0

    def visit(self, folder: Path, depth: int) -> None:
        """Look at a folder, then at those in it."""
        survey, reference = self.survey, reference_in(self.folder, folder)
        try:
            entries = self._entries_of(folder)
        except OSError as error:
            survey.left_out[reference] = _unreadable(reference, error)
            return
        files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        links = [entry for entry in entries if entry.is_symlink()]
        if REPORT in files:
            survey.left_out[reference] = (
                f"{reference} is a mixture that upit-merge made; give the checkpoints of dense models."
            )
            return
        found, told = len(survey.models), dict(survey.left_out)
        problem = self._look_at(folder, reference, {*files, *(link.name for link in links)})
        if folder == self.folder or not _STEP.fullmatch(folder.name):
            is_plain = not problem and len(survey.models) == found
            self._look_for_data(folder, files, depth, tables_only=not is_plain)
            for link in links:
                self._tell_of_link(folder / link.name)
        for entry in entries if depth < _MAX_DEPTH else ():
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith((".", "__")):
                self.visit(folder / entry.name, depth + 1)
        if problem and len(survey.models) == found:
            # What lies below it is a part of it.
            survey.left_out = {**told, reference: problem}

    def _entries_of(self, folder: Path) -> list[os.DirEntry[str]]:
        entries: list[os.DirEntry[str]] = []
        with os.scandir(folder) as found:
            for entry in found:
                self.entries += 1
                if self.entries > _MAX_ENTRIES:
                    break
                entries.append(entry)
        if any(entry.name == "pyvenv.cfg" for entry in entries):
            return []
        return sorted(entries, key=lambda entry: _natural(entry.name))

    def _look_at(self, folder: Path, reference: str, names: set[str]) -> str | None:
        """Open the model that a folder is; return what is wrong if it is only meant to be one."""
        survey = self.survey
        weights = [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))]
        pickles = [n for n in names if n.startswith("pytorch_model") and ".bin" in n]
        is_step = _STEP.fullmatch(folder.name) is not None and folder != self.folder
        is_meant = is_step or any(name in names for name in _TRACES)
        if not (is_meant or weights or pickles):
            found = leaving_in(folder, reference)
            ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
            survey.ggufs += [f"{reference}/{name}" for name in ggufs]
            return found.message if found else None
        if not reference.isprintable():
            return f"{reference!r} has a name that no recipe can hold; rename it."
        try:
            survey.models.append(self._open(folder, reference))
        except UpitError as error:
            known = leaving_in(folder, reference) if not (weights or pickles) else None
            return (known or error).message
        except OSError as error:
            return _unreadable(reference, error)
        return None

    def _open(self, folder: Path, reference: str) -> FoundModel:
        """Open a model and close it again: whatever would be refused later is refused here."""
        if is_adapter(folder):
            check_own_files(reference, folder)
            config = read_adapter_config(reference, folder)
            weights = open_weights(reference, folder, self.options)
            dtype = _dtype_of(weights.specs)
            weights.close()
            if config.base is not None:
                return FoundModel(reference, folder, True, dtype, {}, config.base, CONFIG)
            return FoundModel(reference, folder, True, dtype, {}, *self._origin(folder, {}))
        model = Checkpoint(reference, folder, self.options)
        try:
            read_dense_config(model)
            origin = self._origin(folder, model.config)
            return FoundModel(
                reference, folder, False, _dtype_of(model.specs), model.config, *origin
            )
        finally:
            model.close()

    def _origin(self, folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
        """Return what a model says it was trained from, and which file says so."""
        named = config.get("_name_or_path")
        if isinstance(named, str) and named.strip() and named.isprintable():
            return named, "config.json"
        places = [place for place in (folder, *folder.parents) if place.is_relative_to(self.folder)]
        runs = {place.name for place in places[:2]}
        for place in places[:_MAX_DEPTH]:
            for told_by, value in _notes_in(place, None if place in places[:2] else runs):
                if isinstance(value, list) and len(value) == 1:
                    value = value[0]
                if isinstance(value, str) and value.strip() and value.isprintable():
                    return value, told_by
        return None, ""

    def _look_for_data(
        self, folder: Path, files: set[str], depth: int, *, tables_only: bool
    ) -> None:
        """Look for data.

        Args:
            tables_only: The folder is a model's, whose own JSON and text are no data.
        """
        names = [name for name in sorted(files, key=_natural) if _may_be_data(name)]
        if tables_only:
            names = [name for name in names if not name.lower().endswith((".json", ".txt"))]
        shards = [name for name in names if _SHARD.fullmatch(name)]
        if len(shards) > 1 and shards == names and self._is_readable(folder / shards[0]):
            rank = min(_rank(folder.name), *map(_rank, shards))
            reference = reference_in(self.folder, folder)
            self.survey.data.append(FoundData(reference, rank, depth))
            return
        for name in names:
            if self._is_readable(folder / name):
                reference = reference_in(self.folder, folder / name)
                self.survey.data.append(FoundData(reference, _rank(name), depth + 1))

    def _is_readable(self, path: Path) -> bool:
        """Whether the first record of a file is one that a router can be given."""
        self._peeked += 1
        if self._peeked > _MAX_DATA_FILES or not str(path).isprintable():
            return False
        try:
            if path.suffix.lower() == ".json" and path.stat().st_size > _MAX_DATA_BYTES:
                return True
            return next(iter_examples(str(path)), None) is not None
        except (UpitError, OSError):
            return False

    def _tell_of_link(self, link: Path) -> None:
        """A link may lead anywhere on this machine; those within the folder lead to what is seen."""
        target, home = Path(os.path.realpath(link)), Path(os.path.realpath(self.folder))
        if target.is_relative_to(home):
            return
        reference = reference_in(self.folder, link)
        if target.is_dir():
            self.survey.left_out[reference] = (
                f"{reference} is a link out of the folder; name it with --base or --model."
            )
        elif _may_be_data(link.name):
            self.survey.left_out[reference] = (
                f"{reference} is a link out of the folder; name it with --data."
            )


def _notes_in(folder: Path, runs: set[str] | None) -> Iterator[tuple[str, Any]]:
    """Yield what is named in a folder as the model that a run began with.

    Args:
        runs: Names of the run's folders: settings for other ones do not count. None: the folder is
            the run's own, whose card counts too.
    """
    if runs is None:
        card = _text_of(folder / "README.md")
        if match := re.match(r"---\n(.*?)\n---\n", card, re.DOTALL):
            yield "README.md", _mapping(match[1]).get("base_model")
    for path in sorted(folder.glob("*.y*ml"))[:_MAX_SETTINGS]:
        settings = _mapping(_text_of(path))
        if runs is None or Path(str(settings.get("output_dir"))).name in runs:
            yield path.name, settings.get("model_name_or_path")


def _text_of(path: Path) -> str:
    """Return the text of a file that is only a hint; none if it cannot be read."""
    try:
        if own_file(path, path.parent).is_file():
            with path.open(encoding="utf-8") as file:
                return file.read(_MAX_HINT_CHARACTERS)
    except (UpitError, OSError, ValueError):
        LOG.debug("passed over %s", path)
    return ""


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        document = parse_yaml(text, "notes")
    except UpitError:
        return {}
    return document if isinstance(document, dict) else {}


def _unreadable(reference: str, error: OSError) -> str:
    return f"{reference} cannot be read ({error.strerror}); check its rights."


def _dtype_of(specs: Mapping[str, Any]) -> torch.dtype:
    sizes = Counter[torch.dtype]()
    for spec in specs.values():
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] += spec.num_bytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _may_be_data(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    if name.startswith(".") or suffix not in EXTENSIONS or _NO_DATA.match(name):
        return False
    # Any text can be read, so that only its name says that it is data.
    return suffix != ".txt" or _rank(name) != len(_NAMES)


def _rank(name: str) -> int:
    if _HELD_OUT.search(name):
        return len(_NAMES) + 1
    ranks = (i for i, words in enumerate(_NAMES) if re.search(words, name, re.IGNORECASE))
    return next(ranks, len(_NAMES))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares runs of digits as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
