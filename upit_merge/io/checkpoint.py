"""Complete models on disk, opened lazily: which files hold the weights, and what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from upit_merge.errors import UpitError, one_line
from upit_merge.io import leavings
from upit_merge.io.hub import OpenOptions
from upit_merge.io.pickle_file import PickleFile
from upit_merge.io.safetensors_file import Place, SafetensorsFile
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.io.tensor_names import check_gathered, plain_name, stored_names
from upit_merge.io.untrusted import check_file_name, check_own_files, own_file, read_json

WEIGHT_FILE, WEIGHT_INDEX = SAFE_WEIGHTS = leavings.SAFE_WEIGHTS
PICKLE_FILE, PICKLE_INDEX = PICKLED_WEIGHTS = leavings.PICKLED_WEIGHTS


class Checkpoint:
    """One dense model on disk: its configuration and lazily read tensors.

    Attributes:
        label: The name the recipe gave it.
        folder: The local folder.
        config: The content of `config.json`; read from the folder unless given.
        specs: Shape and stored dtype of every tensor, by the name that transformers has for it;
            that in the file may be another, see `stored_names`.
        is_falsely_tied: Its `config.json` ties head and embeddings, which are two tables.
    """

    is_falsely_tied = False

    def __init__(
        self,
        label: str,
        folder: Path,
        options: OpenOptions,
        *,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.label = label
        self.folder = folder
        check_own_files(label, folder)
        if is_adapter(folder):
            raise UpitError(
                f"{label} is an adapter, but a complete model is needed here; name the model the "
                "adapter was trained on."
            )
        self.config = config or read_json(folder / "config.json", f"checkpoint {label}")
        _check_four_bits(label, self.config)
        self._files = [opener(path) for opener, path in _weight_files(label, folder, options)]
        self._owner = {name: file for file in self._files for name in file.specs}
        self._check_complete()
        self._stored = stored_names(label, self._owner, self.config)
        self.specs: dict[str, TensorSpec] = {
            name: replace(self._owner[stored].specs[stored], name=name)
            for name, stored in self._stored.items()
        }
        check_gathered(label, folder, self.specs)

    def _check_complete(self) -> None:
        """Check that every tensor the index promises is in the files."""
        for index in (WEIGHT_INDEX, PICKLE_INDEX):
            path = self.folder / index
            if path.is_file() and not (self.folder / WEIGHT_FILE).is_file():
                promised = _weight_map(self.label, path)
                missing = [name for name in promised if name not in self._owner]
                if missing:
                    raise UpitError(
                        f"Checkpoint {self.label} lacks {one_line(missing[0])} that its {index} "
                        "lists; copy or download it again."
                    )
                return

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor in its stored dtype, on the CPU."""
        stored = self._stored[name]
        return self._owner[stored].rows(stored, start, stop)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor in its stored dtype, on the CPU."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def place_of(self, name: str) -> Place:
        """Return where in its file a tensor is."""
        return Place(self._stored[name])

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._owner[self._stored[name]].path

    def files(self) -> list[Path]:
        """Return the files that decide its weights."""
        return [self.folder / "config.json", *(file.path for file in self._files)]

    def small_file(self, name: str) -> Path:
        """Return where a file of its settings is, if it has one."""
        return self.folder / name

    def close(self) -> None:
        for file in self._files:
            file.close()


def _check_four_bits(label: str, config: dict[str, Any]) -> None:
    """Refuse what bitsandbytes has quantised, and name the model it was made from."""
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "bitsandbytes":
        return
    full = leavings.without_four_bits(label)
    made_from = "model it was made from" if full == label else Path(full).name
    raise UpitError(
        f"Checkpoint {label} is quantised by bitsandbytes; give the 16-bit {made_from}."
    )


def check_not_compiled(label: str, folder: Path) -> None:
    """Refuse a model that transformers would fill with random weights, because of its names.

    Raises:
        UpitError: torch.compile has put `_orig_mod.` into the names of its safetensors files.
    """
    if not has_any(folder, SAFE_WEIGHTS):
        return
    for _opener, path in _weight_files(label, folder, OpenOptions()):
        # What is wrong with the file, transformers says.
        with contextlib.suppress(SafetensorError), safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if compiled := next((name for name in names if plain_name(name) != name), None):
                raise UpitError(
                    f"{path} has {one_line(compiled)}, a name of torch.compile's that training "
                    "does not find; remove _orig_mod. from the names, as docs/troubleshooting.md "
                    "shows."
                )


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter, and not a complete model beside it."""
    return (folder / "adapter_config.json").is_file() and not has_any(folder, SAFE_WEIGHTS)


def has_any(folder: Path, names: Iterable[str]) -> bool:
    """Return whether one of these files is there."""
    return any((folder / name).is_file() for name in names)


def _weight_files(
    label: str, folder: Path, options: OpenOptions
) -> Iterable[tuple[type[SafetensorsFile] | type[PickleFile], Path]]:
    if (folder / WEIGHT_FILE).is_file():
        return [(SafetensorsFile, own_file(folder / WEIGHT_FILE, folder))]
    if (folder / WEIGHT_INDEX).is_file():
        return [(SafetensorsFile, path) for path in _indexed(label, folder, WEIGHT_INDEX)]
    for name in (PICKLE_FILE, PICKLE_INDEX):
        if (folder / name).is_file():
            if not options.allow_pickle:
                raise UpitError(
                    f"Checkpoint {label} has only {name}, a pickle that could run code; convert it "
                    "to safetensors, or pass --lazy-unpickle to read it with weights_only."
                )
            if name == PICKLE_FILE:
                return [(PickleFile, own_file(folder / name, folder))]
            return [(PickleFile, path) for path in _indexed(label, folder, name)]
    raise UpitError(
        f"Checkpoint {label} has no weights ({WEIGHT_FILE} or {WEIGHT_INDEX}) in {folder}; give "
        "the folder of a complete Hugging Face checkpoint."
    )


def _weight_map(label: str, index: Path) -> dict[str, str]:
    """Return which tensor an index says to be in which file."""
    weight_map = read_json(index, f"checkpoint {label}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UpitError(f"{index} has no usable weight_map; copy or download it again.")
    return weight_map


def _indexed(label: str, folder: Path, index: str) -> list[Path]:
    paths = []
    for filename in sorted(set(_weight_map(label, folder / index).values())):
        check_file_name(folder / index, filename)
        path = folder / filename
        if not path.is_file():
            raise UpitError(
                f"Checkpoint {label} lacks the shard {filename} that its {index} lists; copy or "
                "download it again."
            )
        paths.append(own_file(path, folder))
    return paths
