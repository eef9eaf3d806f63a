"""What is in an adapter's file, and what it changes of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.language_part import language_name, language_settings
from upit_merge.io.pickle_file import PickleFile
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.io.tensor_names import check_gathered, plain_name
from upit_merge.io.untrusted import own_file
from upit_merge.models.dense import ffn_modules, left_out
from upit_merge.models.lora.change import Change, Owner, WeightFile
from upit_merge.models.lora.config import CONFIG, AdapterConfig
from upit_merge.models.lora.tables import TABLES, Tables

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
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "weight",
    ".base_layer.weight": "weight",
    ".weight": "weight",
}
# Besides, of a table that is trained whole and was resized: what it was before, and again itself.
_REPEATED = tuple(
    f"{_PREFIX}{table}.{copy}.weight"
    for table in TABLES
    for copy in ("original_module", "modules_to_save")
)


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
    check_gathered(label, file.path.parent, file.specs)
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
            if self._plain(name) in _REPEATED:
                continue
            module, part = self._module_of(name)
            if part in by_module[module]:
                raise UpitError(
                    f"Checkpoint {self.label} has {by_module[module][part]} and {name}, which "
                    "cannot both be; save the adapter again."
                )
            by_module[module][part] = name
        ties = bool(language_settings(self.base.config).get("tie_word_embeddings"))
        owner = Owner(self.label, self.base.label, ties, self.settings, self.file)
        tables = {name: by_module[name] for name in TABLES if name in by_module}
        changes = {
            f"{module}.weight": owner.change(module, parts, f"{module}.weight", shape)
            for module, parts in by_module.items()
            if module not in TABLES and (shape := self._shape(module, parts))
        }
        changes |= Tables(owner, self.base).changes(tables)
        unused = left_out(self.base)  # such as a vision tower, or keys that another layer's replace
        linear = [
            spec.name.removesuffix(".weight")
            for spec in self.base.specs.values()
            if len(spec.shape) == 2
            and spec.name not in unused
            and spec.name.removesuffix(".weight") not in TABLES
        ]
        if missing := self.settings.missing(linear, by_module):
            raise UpitError(
                f"Checkpoint {self.label} has no tensors for {missing}, which its {CONFIG} names; "
                "save the adapter again."
            )
        modules = ffn_modules(self.base)
        if not any(name.split(".")[-2] in modules for name in changes):
            raise UpitError(
                f"Checkpoint {self.label} has trained no FFN module ({', '.join(modules)}), so "
                "there is no expert in it; use an adapter that has, as attention is shared by all "
                "experts."
            )
        return changes

    def _shape(self, module: str, parts: Mapping[str, str]) -> tuple[int, ...]:
        """Return the shape of what becomes of a module that is no table."""
        spec = self.base.specs.get(f"{module}.weight")
        if spec is None:
            raise UpitError(
                f"Checkpoint {self.label} changes {module}, which the base {self.base.label} has "
                "not; name the base it was trained on."
            )
        if "tokens" in parts:
            raise UpitError(
                f"Checkpoint {self.label} has trained tokens of {module}, which is no table of "
                "tokens; save the adapter again."
            )
        return self.file.specs[parts["weight"]].shape if "weight" in parts else spec.shape

    def _plain(self, name: str) -> str:
        """Return a tensor's name as an adapter of the language model alone has it."""
        plain = plain_name(name)
        if not plain.startswith(_PREFIX):
            return plain
        return _PREFIX + language_name(plain.removeprefix(_PREFIX), self.base.config)

    def _module_of(self, name: str) -> tuple[str, str]:
        """Return the module a tensor belongs to, and which part of it the tensor is."""
        plain = self._plain(name)
        suffix = next((suffix for suffix in _SUFFIXES if plain.endswith(suffix)), None)
        if not plain.startswith(_PREFIX) or suffix is None:
            reason = "cannot be applied"
            if name.endswith(".bias"):
                reason = "is a bias, which cannot be applied"
            raise UpitError(
                f"Checkpoint {self.label} has the tensor {name}, which {reason}; use a plain LoRA "
                "adapter without biases, or merge it into its base first (PEFT's merge_and_unload)."
            )
        return plain[len(_PREFIX) : -len(suffix)], _SUFFIXES[suffix]
