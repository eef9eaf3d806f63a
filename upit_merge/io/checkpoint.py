"""Dense checkpoints, opened lazily and checked against each other before any work starts."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError, first_line, one_line, shown
from upit_merge.io.hub import OpenOptions
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import DTYPES, SafetensorsFile, TensorSpec, check_tensor_name

WEIGHT_FILE = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
SAFE_WEIGHTS = (WEIGHT_FILE, WEIGHT_INDEX)
PICKLED_WEIGHTS = (PICKLE_FILE, PICKLE_INDEX)

# Of the files of a model folder, those that we, transformers or mergekit read, besides weights.
_SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.md",
    "*.model",
    "*.py",
    "*.tiktoken",
    "*.txt",
    "additional_chat_templates",
    "additional_chat_templates/*",
)
_MAX_JSON_BYTES = 100_000_000  # as the safetensors library has it for headers


class PickleFile:
    """A `.bin` shard: unpickled with `weights_only`, its storages memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not zipfile.is_zipfile(path):
            raise UpitError(
                f"{path} is not a file of torch.save (or of one before torch 1.6), or is truncated;"
                " copy or download it again, or convert the checkpoint to safetensors."
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises whatever the file makes it raise
            reason = one_line(first_line(error))
            if isinstance(error, pickle.UnpicklingError):
                # torch's own words advise to run the code.
                reason = "it is corrupt or holds objects other than tensors, which could run code"
            raise UpitError(
                f"{path} cannot be read with weights_only ({reason}); convert the checkpoint to "
                "safetensors."
            ) from error
        if not isinstance(state, Mapping):
            raise UpitError(
                f"{path} does not hold a state dict but a {type(state).__name__}; convert the "
                "checkpoint to safetensors."
            )
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            check_tensor_name(path, name)
            dense = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
            if not dense or tensor.is_meta or tensor.dtype not in DTYPES.values():
                raise UpitError(
                    f"{path} stores {name} in a form that cannot be merged; convert the "
                    "checkpoint to safetensors in float32, float16 or bfloat16."
                )
            self._tensors[name] = tensor.detach()
        self.specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][start:stop].clone()

    def close(self) -> None:
        self._tensors = {}


class Checkpoint:
    """One dense model on disk: its configuration and lazily read tensors.

    Attributes:
        label: The name the recipe gave it.
        folder: The local folder.
        config: The content of `config.json`; read from the folder unless given.
        specs: Shape and stored dtype of every tensor, by name.
    """

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
        self._files = [opener(path) for opener, path in _weight_files(label, folder, options)]
        self._owner = {name: file for file in self._files for name in file.specs}
        self.specs: dict[str, TensorSpec] = {
            name: file.specs[name] for name, file in self._owner.items()
        }
        self._check_complete()

    def _check_complete(self) -> None:
        """Every tensor the index promises must be in the files."""
        for index in (WEIGHT_INDEX, PICKLE_INDEX):
            path = self.folder / index
            if path.is_file() and not (self.folder / WEIGHT_FILE).is_file():
                promised = _weight_map(self.label, path)
                missing = [name for name in promised if name not in self.specs]
                if missing:
                    raise UpitError(
                        f"Checkpoint {self.label} lacks {one_line(missing[0])} that its {index} "
                        "lists; copy or download it again."
                    )
                return

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor in its stored dtype, on the CPU."""
        return self._owner[name].rows(name, start, stop)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype, on the CPU."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._owner[name].path

    def files(self) -> list[Path]:
        """The files that decide its weights."""
        return [self.folder / "config.json", *(file.path for file in self._files)]

    def small_file(self, name: str) -> Path:
        """Where a file of its settings is, if it has one."""
        return self.folder / name

    def close(self) -> None:
        for file in self._files:
            file.close()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object from a file.

    Raises:
        UpitError: the file is missing, huge or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UpitError(f"{path} is too large for JSON of a model; copy or download it again.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UpitError(
            f"{what[0].upper()}{what[1:]} has no {path.name} in {path.parent}; give the folder of "
            "a complete Hugging Face checkpoint."
        ) from None
    except OSError as error:
        raise UpitError(f"{path} cannot be read ({error.strerror}); check the file.") from None
    except (ValueError, RecursionError) as error:
        raise UpitError(f"{path} is not valid JSON ({error}); copy or download it again.") from None
    if not isinstance(content, dict):
        raise UpitError(f"{path} is not a JSON object; copy or download it again.")
    return content


def own_file(path: Path, folder: Path) -> Path:
    """`path`, once it is sure that reading it reads a file of the model folder `folder`.

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
    """Check every small file of a model, whoever will read or copy it later."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UpitError(
            f"Checkpoint {label} cannot be read in {folder}; check the folder's rights."
        )
    for pattern in _SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            own_file(path, folder)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and not a complete model beside it."""
    return (folder / "adapter_config.json").is_file() and not has_any(folder, SAFE_WEIGHTS)


def has_any(folder: Path, names: Iterable[str]) -> bool:
    """Whether one of these files is there."""
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
    """Which tensor an index says to be in which file."""
    weight_map = read_json(index, f"checkpoint {label}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UpitError(f"{index} has no usable weight_map; copy or download it again.")
    return weight_map


def _indexed(label: str, folder: Path, index: str) -> list[Path]:
    paths = []
    for filename in sorted(set(_weight_map(label, folder / index).values())):
        # An index from the internet must not make us read anywhere else, on any system.
        if re.search(r"[/\\:]", filename) or filename in (".", ".."):
            raise UpitError(
                f"{folder / index} points outside its folder ({one_line(filename)}); do not use "
                "this checkpoint."
            )
        if not re.fullmatch(r"[ -~]{1,255}", filename):
            raise UpitError(
                f"{folder / index} names {shown(filename)} as a file; do not use this checkpoint."
            )
        path = folder / filename
        if not path.is_file():
            raise UpitError(
                f"Checkpoint {label} lacks the shard {filename} that its {index} lists; copy or "
                "download it again."
            )
        paths.append(own_file(path, folder))
    return paths


def check_same_tensors(
    base: DenseModel, others: Sequence[DenseModel], names: Iterable[str]
) -> None:
    """Every other model must have the given tensors of the base, in the base's shapes.

    Raises:
        UpitError: naming the checkpoint, the tensor and both shapes.
    """
    for name in names:
        for checkpoint in others:
            spec = checkpoint.specs.get(name)
            if spec is None:
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has no tensor {name}; use a complete "
                    f"{base.config.get('model_type')} checkpoint."
                )
            expected = base.specs[name].shape
            if spec.shape == expected:
                continue
            table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            if table and len(spec.shape) == 2 and spec.shape[1:] == expected[1:]:
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has a vocabulary of {spec.shape[0]} in {name}, "
                    f"the base {base.label} one of {expected[0]}; resize the base's embeddings to "
                    "the tokenizer the checkpoints were trained with."
                )
            raise UpitError(
                f"Checkpoint {checkpoint.label} has {name} of shape {list(spec.shape)}, the base "
                f"{base.label} has {list(expected)}; all models must come from the same base."
            )
