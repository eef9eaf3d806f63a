"""What is in an adapter's file, and what it changes of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.pickle_file import PickleFile
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.io.untrusted import own_file
from upit_merge.models.formats import PROJECTIONS
from upit_merge.models.lora.config import CONFIG, AdapterConfig

WeightFile = SafetensorsFile | PickleFile

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

# How PEFT names its tensors: this, the module, and what the tensor is of the module.
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".lora_magnitude_vector": "magnitudes",
    ".lora_magnitude_vector.weight": "magnitudes",
    ".base_layer.weight": "weight",
    ".weight": "weight",
}
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one of its base's tensors.

    Attributes:
        parts: Names in the adapter's file: of `A` and `B`, or `embedding A` and `embedding B`, of
            `magnitudes`, and of a `weight` that takes the place of the base's.
        scale: Of the product of the factors.
        rank: Of the factors; 0 without.
    """

    parts: Mapping[str, str]
    scale: float
    rank: int

    @property
    def is_low_rank(self) -> bool:
        return not {"weight", "magnitudes"} & self.parts.keys()


def open_weights(label: str, folder: Path, options: OpenOptions) -> WeightFile:
    """Return the file of an adapter's tensors.

    Raises:
        UpitError: there is none, or it is a pickle that may not be read.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(own_file(folder / WEIGHTS, folder))
    if not (folder / PICKLED_WEIGHTS).is_file():
        raise UpitError(
            f"Checkpoint {label} has an {CONFIG} but no {WEIGHTS} in {folder}; give the folder of "
            "a complete adapter."
        )
    if not options.allow_pickle:
        raise UpitError(
            f"Checkpoint {label} has only {PICKLED_WEIGHTS}, a pickle that could run code; convert "
            "it to safetensors, or pass --lazy-unpickle to read it with weights_only."
        )
    return PickleFile(own_file(folder / PICKLED_WEIGHTS, folder))


def read_changes(
    label: str, settings: AdapterConfig, base: Checkpoint, file: WeightFile
) -> dict[str, Change]:
    """Return what the adapter changes, by name of the base's tensor.

    Raises:
        UpitError: a tensor is unknown, missing, or does not fit the base or the settings.
    """
    return _Reader(label, settings, base, file).changes()


@dataclass(frozen=True)
class _Reader:
    """Finds out what an adapter's tensors are for, and that they are what its settings say."""

    label: str
    settings: AdapterConfig
    base: Checkpoint
    file: WeightFile

    def changes(self) -> dict[str, Change]:
        by_module: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.file.specs:
            module, part = self._module_of(name)
            if part in by_module[module]:
                raise UpitError(
                    f"Checkpoint {self.label} has {by_module[module][part]} and {name}, which "
                    "cannot both be; save the adapter again."
                )
            by_module[module][part] = name
        changes = {f"{m}.weight": self._change(m, parts) for m, parts in by_module.items()}
        linear = [
            spec.name.removesuffix(".weight")
            for spec in self.base.specs.values()
            if len(spec.shape) == 2 and spec.name not in _TABLES
        ]
        if missing := self.settings.missing(linear, by_module):
            raise UpitError(
                f"Checkpoint {self.label} has no tensors for {missing}, which its {CONFIG} names; "
                "save the adapter again."
            )
        if not any(name.split(".")[-2] in PROJECTIONS for name in changes):
            raise UpitError(
                f"Checkpoint {self.label} has trained no FFN module ({', '.join(PROJECTIONS)}), so "
                "there is no expert in it; use an adapter that has, as attention is shared by all "
                "experts."
            )
        return self._untied(changes)

    def _module_of(self, name: str) -> tuple[str, str]:
        """Return the module a tensor belongs to, and which part of it the tensor is."""
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if not name.startswith(_PREFIX) or suffix is None:
            reason = "cannot be applied"
            if name.endswith(".bias"):
                reason = "is a bias, which Mixtral cannot express"
            raise UpitError(
                f"Checkpoint {self.label} has the tensor {name}, which {reason}; use a plain LoRA "
                "adapter without biases, or merge it into its base first (PEFT's merge_and_unload)."
            )
        return name[len(_PREFIX) : -len(suffix)], _SUFFIXES[suffix]

    def _change(self, module: str, parts: Mapping[str, str]) -> Change:
        spec = self.base.specs.get(f"{module}.weight")
        if spec is None and not (module == "lm_head" and self._tied):
            raise UpitError(
                f"Checkpoint {self.label} changes {module}, which the base {self.base.label} has "
                "not; name the base it was trained on."
            )
        factors = [part for part in ("A", "B", "embedding A", "embedding B") if part in parts]
        if not factors and "magnitudes" not in parts:
            return Change(parts, 1.0, 0)
        self._check_parts(module, factors, parts)
        shape = spec.shape if spec else self.base.specs[_TABLES[0]].shape
        if "weight" in parts:
            shape = self.file.specs[parts["weight"]].shape
        first, second = (self.file.specs[parts[part]].shape for part in factors)
        rank, ranks = self.settings.rank(module), (*first[:1], *second[1:])
        if len(first) != 2 or len(second) != 2 or ranks != (rank, rank):
            raise UpitError(
                f"Checkpoint {self.label} has factors of shapes {list(first)} and {list(second)} "
                f"for {module}, but its {CONFIG} says rank {rank}; save the adapter again."
            )
        product = (second[0], first[1]) if "A" in parts else (first[1], second[0])
        if product != shape:
            raise UpitError(
                f"Checkpoint {self.label} was trained for another base: its factors for {module} "
                f"make {list(product)}, the base {self.base.label} has {list(shape)}."
            )
        if "magnitudes" in parts and self.file.specs[parts["magnitudes"]].shape != shape[:1]:
            found = list(self.file.specs[parts["magnitudes"]].shape)
            raise UpitError(
                f"Checkpoint {self.label} has magnitudes of shape {found} for {module}, which has "
                f"{shape[0]} rows; save the adapter again."
            )
        return Change(parts, self.settings.scale(module), rank)

    def _check_parts(self, module: str, factors: list[str], parts: Mapping[str, str]) -> None:
        if factors not in (["A", "B"], ["embedding A", "embedding B"]):
            raise UpitError(
                f"Checkpoint {self.label} has not both factors for {module} (it has "
                f"{', '.join(parts.values())}); save the adapter again."
            )
        if self.settings.dora and factors[0] != "A":
            raise UpitError(
                f"Checkpoint {self.label} has DoRA on {module}, which is not supported on "
                "embeddings; merge it into its base first (PEFT's merge_and_unload)."
            )
        if self.settings.dora != ("magnitudes" in parts):
            has = "no magnitudes" if self.settings.dora else "magnitudes"
            raise UpitError(
                f"Checkpoint {self.label} has {has} for {module}, but its {CONFIG} sets use_dora "
                f"to {str(self.settings.dora).lower()}; save the adapter again."
            )

    @property
    def _tied(self) -> bool:
        return bool(self.base.config.get("tie_word_embeddings"))

    def _untied(self, changes: dict[str, Change]) -> dict[str, Change]:
        """Embeddings that are the head too can only be changed with it: trainers save both."""
        tables = [changes[name] for name in _TABLES if name in changes]
        if not tables or not self._tied:
            return changes
        copies = [change.parts["weight"] for change in tables if change.parts.keys() == {"weight"}]
        if len(copies) != 2 or not self._equal(*copies):
            raise UpitError(
                f"Checkpoint {self.label} changes {' and '.join(n for n in _TABLES if n in changes)}"
                f", but the base {self.base.label} ties its embeddings; merge the adapter into its "
                "base first, untied (tie_word_embeddings: false)."
            )
        del changes[_TABLES[1]]
        return changes

    def _equal(self, first: str, second: str) -> bool:
        """Return whether two tensors of the file are the same, looked at block by block."""
        specs = self.file.specs
        if specs[first].shape != specs[second].shape:
            return False
        for start in range(0, specs[first].shape[0], 1024):
            stop = min(start + 1024, specs[first].shape[0])
            if not torch.equal(*(self.file.rows(n, start, stop) for n in (first, second))):
                return False
        return True
