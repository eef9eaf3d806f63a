"""The files of a model that has more or fewer experts than before."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upit_merge.io.checkpoint import WEIGHT_FILE, WEIGHT_INDEX, Checkpoint
from upit_merge.io.disk import check_space
from upit_merge.io.safetensors_file import Place, places_in
from upit_merge.io.shards import Shard, ShardWriter, plan_shards, shard_index
from upit_merge.io.tensor_file import TensorSpec, row_blocks
from upit_merge.io.text_file import write_json
from upit_merge.models.mixture import MixtureArchitecture, parameter_counts
from upit_merge.models.published import packed_specs
from upit_merge.output.patch import PatchedCopies
from upit_merge.resizing.sources import ResizedMixture
from upit_merge.runtime.parallel import map_in_order, progress_bar

LOG = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 1 << 20
_GATES_FILE = "model-gates.safetensors"
# A folder with an index must have no file of this name: readers would take it for the whole.
_RENAMED = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Layout:
    """What is where in the changed model.

    Attributes:
        written: Files to write.
        kept: Files of the model that stay as they are.
        obsolete: Names of its files that go.
    """

    written: tuple[Shard, ...]
    kept: tuple[Shard, ...]
    obsolete: tuple[str, ...]

    @property
    def shards(self) -> list[Shard]:
        return [*self.kept, *self.written]


def _files_of(moe: Checkpoint) -> dict[str, list[TensorSpec]]:
    files: dict[str, list[TensorSpec]] = {}
    for name, spec in moe.specs.items():
        files.setdefault(moe.file_of(name).name, []).append(spec)
    return files


def extended_layout(
    moe: Checkpoint,
    extended: ResizedMixture,
    gates: Collection[str],
    stem: str,
    max_shard_bytes: int,
) -> Layout:
    """Plan the files of a model with one more expert: those without gates are not touched.

    Args:
        gates: Names of the gates and whatever else changes its shape.
        stem: What the new expert's files are called.
    """
    kept, written, obsolete = [], [], []
    gates_file = _GATES_FILE
    for filename, specs in _files_of(moe).items():
        rest = [spec for spec in specs if spec.name not in gates]
        if len(rest) == len(specs):
            kept.append(Shard(filename, tuple(specs)))
        elif rest:
            new = _RENAMED if filename == WEIGHT_FILE else filename
            written.append(Shard(new, tuple(rest)))
            obsolete += [filename] if new != filename else []
        elif gates_file == _GATES_FILE and filename != WEIGHT_FILE:
            gates_file = filename
        else:
            obsolete.append(filename)
    new_specs = [spec for name, spec in extended.specs.items() if name not in moe.specs]
    written += plan_shards([new_specs], max_shard_bytes, stem)
    written.append(Shard(gates_file, tuple(extended.specs[name] for name in gates)))
    return Layout(tuple(written), tuple(kept), tuple(obsolete))


def rewritten_layout(
    moe: Checkpoint, changed: ResizedMixture, gates: Collection[str], max_shard_bytes: int
) -> Layout:
    """Plan the files of a model that is written anew, such as one whose experts get other numbers."""
    body = [spec for name, spec in changed.specs.items() if name not in gates]
    groups = body, [changed.specs[name] for name in gates]
    form = changed.architecture.format
    written = plan_shards([packed_specs(form, group) for group in groups], max_shard_bytes)
    names = {shard.filename for shard in written}
    old = [*_files_of(moe), *([WEIGHT_INDEX] if len(written) == 1 else [])]
    obsolete = (name for name in old if name not in names and (moe.folder / name).is_file())
    return Layout(written, (), tuple(obsolete))


def write_model(
    folder: Path, layout: Layout, source: ResizedMixture, added: Mapping[str, Any], *, quiet: bool
) -> None:
    """Write what is new into a folder: weights, index, `config.json`.

    Args:
        folder: Must be there.
        added: Tensors that are in memory, by name, instead of the source's.

    Raises:
        UpitError: a tensor is broken.
        ResumableError: the files do not fit the disk.
    """
    total = sum(shard.num_bytes for shard in layout.written)
    check_space(folder, total, "the changed files")
    blocks = [
        (spec, start, stop)
        for shard in layout.written
        for spec in shard.parts
        for start, stop in row_blocks(spec, _BLOCK_ELEMENTS)
    ]
    with (
        ShardWriter(folder, layout.written) as writer,
        progress_bar(total, "writing", quiet=quiet) as bar,
    ):

        def write(block: tuple[TensorSpec, int, int]) -> int:
            spec, start, stop = block
            ready = added.get(spec.name)
            rows = source.rows(spec.name, start, stop) if ready is None else ready[start:stop]
            writer.write(spec.name, start, rows)
            return (stop - start) * spec.row_bytes

        for done in map_in_order(write, blocks, workers=2):
            bar.update(done)
    if len(layout.shards) > 1:
        write_json(folder / WEIGHT_INDEX, shard_index(layout.shards))
    write_json(folder / "config.json", source.config)


@dataclass(frozen=True)
class PublishedCopies(PatchedCopies):
    """A whole model written anew under the published names, in which tensors are replaced.

    For a mixture whose files have others: where a file has several experts in one tensor, none of
    them can be replaced in a copy that others would read.

    Args:
        architecture: The model's.
        max_shard_bytes: Upper bound of a file.
        quiet: Show no progress.
    """

    architecture: MixtureArchitecture
    max_shard_bytes: int
    quiet: bool

    @cached_property
    def _source(self) -> ResizedMixture:
        """The model with as many experts as it has."""
        return ResizedMixture(self.moe, self.architecture, self.architecture.num_experts)

    @cached_property
    def _layout(self) -> Layout:
        gates = self.architecture.of_gates()
        return rewritten_layout(self.moe, self._source, gates, self.max_shard_bytes)

    @cached_property
    def _names(self) -> Mapping[str, str]:
        return {spec.name: s.filename for s in self._layout.written for spec in s.parts}

    @cached_property
    def _places(self) -> Mapping[str, Place]:
        return {
            name: place
            for shard in self._layout.written
            for spec in shard.tensors
            for name, place in places_in(spec)
        }

    def copy_of(self, name: str) -> Path:
        """Return where the file that a tensor is written into is, or will be."""
        return self.folder / self._names[name]

    def place_of(self, name: str) -> Place:
        """Return where in that file the tensor is."""
        return self._places[name]

    @property
    def obsolete(self) -> tuple[str, ...]:
        """Return the names of the model's files that go."""
        return self._layout.obsolete

    def prepare(self, names: Iterable[str]) -> None:
        """Write all files, whichever tensors will be replaced.

        Raises:
            UpitError: they do not fit the disk.
        """
        if all((self.folder / shard.filename).exists() for shard in self._layout.written):
            return
        LOG.warning(
            "%s has its experts under the names that transformers has in memory; it is written "
            "anew under the published ones.",
            self.moe.label,
        )
        write_model(self.folder, self._layout, self._source, {}, quiet=self.quiet)


def resized(
    before: Mapping[str, Any], architecture: MixtureArchitecture, num_experts: int
) -> dict[str, Any]:
    """Return the report's `model` with another number of experts; {} for one of an older version."""
    if not isinstance(before.get("model"), Mapping):
        return {}
    chosen = architecture.format.chosen(architecture.config)
    settings = architecture.dense_settings()
    counts = parameter_counts(architecture.format, settings, num_experts, chosen)
    return {"model": {**before["model"], **counts}}
