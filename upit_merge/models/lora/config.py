"""What an adapter's `adapter_config.json` says, read as PEFT reads it; what cannot be applied."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError, first_line, one_line, shown
from upit_merge.io.hub import looks_like_path
from upit_merge.io.leavings import without_four_bits
from upit_merge.io.untrusted import read_json

LOG = logging.getLogger(__name__)

CONFIG = "adapter_config.json"

# How LoRA's factors may begin without the base's weights being changed to fit them.
_HARMLESS_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

# Settings that make of the factors something else than a weight's difference.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

# PEFT takes the names in a pattern for regular expressions, which may take for ever to match.
_MAX_REPEATS = 4
_MAX_GROUPS = 4
_MAX_ALTERNATIVES = 128
_MAX_CHARACTERS = 1000
_MAX_PATTERNS = 10_000


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that decide what an adapter's tensors mean.

    Args:
        base: The reference of the model it was trained on, if it says so.
        dora: Rows have magnitudes of their own.
        targets: The names of the modules it has factors for; None if a pattern says which.
        replaced: Ends of the names of modules that it has whole (`modules_to_save`).
        tokens: Rows of tables that it has (`trainable_token_indices`), by the end of the table's
            name.
        keeps_tied: A head that shares its weights with the embeddings changes with them.
    """

    label: str
    base: str | None
    dora: bool
    targets: frozenset[str] | None
    replaced: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    keeps_tied: bool
    _peft: Any

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return self._of(module, self._peft.rank_pattern, self._peft.r)

    def scale(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied with."""
        rank = self.rank(module)
        alpha = self._of(module, self._peft.alpha_pattern, self._peft.lora_alpha)
        return alpha / (math.sqrt(rank) if self._peft.use_rslora else rank)

    def is_replaced(self, module: str) -> bool:
        """Return whether the adapter has a module whole, by PEFT's matching."""
        return any(module.endswith(name) for name in self.replaced)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Return which rows of a table the adapter has, in its order; None if that is not said."""
        found = (rows for name, rows in self.tokens.items() if module.endswith(name))
        return next(found, None)

    def _of(self, module: str, pattern: Mapping[str, Any], default: Any) -> Any:
        from peft.utils.other import get_pattern_key

        return pattern.get(get_pattern_key(pattern.keys(), module), default)

    def missing(self, modules: Collection[str], found: Collection[str]) -> str | None:
        """The first of the base's modules that should be among the found, by PEFT's matching."""
        from peft.tuners.tuners_utils import check_target_module_exists

        for pattern in self.replaced:
            if not any(re.match(rf"(^|.*\.){pattern}($|\..*)", module) for module in found):
                return pattern
        if self.targets is None:
            return None
        for module in modules:
            if module not in found and check_target_module_exists(self._peft, module):
                return module
        return None


def read_adapter_config(label: str, folder: Path) -> AdapterConfig:
    """Read and check an adapter's configuration.

    Raises:
        UpitError: it is not valid, or it is no LoRA that can be added to the base's weights.
    """
    raw = read_json(folder / CONFIG, f"checkpoint {label}")
    _check_unsupported(label, raw)
    config = _parsed(label, folder, raw)
    _check_values(folder, config)
    _check_slow_patterns(folder, config)
    targets = config.target_modules
    return AdapterConfig(
        label=label,
        base=config.base_model_name_or_path or None,
        dora=bool(config.use_dora),
        targets=None if isinstance(targets, str) or targets is None else frozenset(targets),
        replaced=tuple(config.modules_to_save or ()),
        tokens={name: tuple(rows) for name, rows in _token_rows(config).items()},
        keeps_tied=bool(getattr(config, "ensure_weight_tying", False)),  # PEFT below 0.19 has none
        _peft=config,
    )


def _check_unsupported(label: str, raw: Mapping[str, Any]) -> None:
    merge = "merge it into its base first (PEFT's merge_and_unload)"
    if raw.get("peft_type") != "LORA":
        raise UpitError(
            f"Checkpoint {label} is an adapter of type {shown(raw.get('peft_type'))}, of which "
            f"only LORA can be read; {merge}."
        )
    start = raw.get("init_lora_weights", True)
    if str(start).lower() not in _HARMLESS_STARTS:
        raise UpitError(
            f"Checkpoint {label} was initialised by {one_line(start)}, which changes the base's "
            "weights too; save it with PEFT's path_initial_model_for_weight_conversion."
        )
    for key in _VARIANTS:
        if raw.get(key):
            raise UpitError(f"Checkpoint {label} sets {key}, which cannot be read; {merge}.")


def _parsed(label: str, folder: Path, raw: Mapping[str, Any]) -> Any:
    """PEFT's view of the configuration, with its defaults filled in."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    content = {key: value for key, value in raw.items() if key in known}
    if unknown := [key for key, value in raw.items() if value and key not in known]:
        LOG.warning(
            "Checkpoint %s sets %s, which the installed version of PEFT does not know; what it "
            "stands for is left out.",
            label,
            one_line(unknown[0]),
        )
    try:
        with warnings.catch_warnings(record=True):  # on settings that were checked already
            return LoraConfig.from_peft_type(**content)
    except Exception as error:  # whatever a value of the wrong kind makes PEFT raise
        raise UpitError(
            f"The {CONFIG} of checkpoint {label} is not a valid LoRA configuration "
            f"({one_line(first_line(error))}); copy or download {folder} again."
        ) from None


def _check_values(folder: Path, config: Any) -> None:
    """PEFT takes what it is given; here everything must be what it is called."""

    def check(key: str, value: Any, right: bool) -> None:
        if not right:
            raise _invalid(folder, key, value)

    check("r", config.r, _is_rank(config.r))
    check("lora_alpha", config.lora_alpha, _is_number(config.lora_alpha))
    for key, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = getattr(config, key) or {}
        check(key, pattern, isinstance(pattern, dict))
        for value in pattern.values():
            check(key, value, is_right(value))
        setattr(config, key, pattern)
    for key in ("use_dora", "use_rslora"):
        check(key, getattr(config, key), isinstance(getattr(config, key), bool))
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = getattr(config, key)
        names = {str: [value], type(None): []}.get(type(value), value)
        right = isinstance(names, (list, set)) and all(isinstance(name, str) for name in names)
        check(key, value, right and (key != "modules_to_save" or not isinstance(value, str)))
    layers = config.layers_to_transform
    numbers = layers if isinstance(layers, list) else [layers or 0]
    check("layers_to_transform", layers, all(type(number) is int for number in numbers))
    for name, rows in _token_rows(config).items():
        right = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        right = right and 0 < len(rows) == len(set(rows))
        check("trainable_token_indices", rows, right and isinstance(name, str) and bool(name))
    base = config.base_model_name_or_path
    check("base_model_name_or_path", base, base is None or isinstance(base, str))


def _token_rows(config: Any) -> Mapping[str, Any]:
    """Return `trainable_token_indices` by table; a list alone means the embeddings."""
    rows = config.trainable_token_indices
    if rows is None or rows == []:
        return {}
    return rows if isinstance(rows, dict) else {"embed_tokens": rows}


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def _check_slow_patterns(folder: Path, config: Any) -> None:
    layers = config.layers_pattern
    for key, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
        ("modules_to_save", config.modules_to_save or ()),
        ("layers_pattern", [layers] if isinstance(layers, str) else layers or ()),
        ("exclude_modules", [e] if isinstance(e := config.exclude_modules, str) else ()),
    ):
        if len(patterns) > _MAX_PATTERNS:
            raise _invalid(folder, key, f"of {len(patterns)} entries")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError, RecursionError, OverflowError):
                raise _invalid(folder, key, pattern) from None
            if _may_be_slow(pattern):
                raise UpitError(
                    f"{folder / CONFIG} has {key} {shown(pattern)}, a pattern that could take for "
                    "ever to match; write the names of the modules instead."
                )


def _may_be_slow(pattern: str) -> bool:
    """Return whether a regular expression has more ways to match than are tried in a moment."""
    repeats = len(re.findall(r"[*+{]|(?<!\()\?", pattern))
    return bool(
        len(pattern) > _MAX_CHARACTERS
        or repeats > _MAX_REPEATS
        or pattern.count("(") > _MAX_GROUPS
        or pattern.count("|") > _MAX_ALTERNATIVES
        or re.search(r"\)[*+{?]", pattern)
        or re.search(r"(^|[(|])(\||\)|$)", pattern)  # an alternative that matches nothing
    )


def _invalid(folder: Path, key: str, value: Any) -> UpitError:
    return UpitError(
        f"{folder / CONFIG} has {key} {shown(value)}, which is not a plain value of this setting; "
        "correct it, or save the adapter again."
    )


def check_adapter_base(config: AdapterConfig, reference: str, folder: Path) -> None:
    """Refuse an adapter whose configuration names a base that is certainly another one.

    What it names may be a folder on the machine it was trained on, which says nothing here.

    Args:
        reference: The recipe's name of the base it is to be applied to.
        folder: That base's local folder.

    Raises:
        UpitError: both are folders here or both Hub ids, and they are not the same.
    """
    if config.base is None:
        return
    named = os.path.expanduser(config.base)
    local, here = os.path.isdir(named), os.path.isdir(os.path.expanduser(reference))
    if local and here:
        same = os.path.realpath(named) == os.path.realpath(folder)
    elif local or here or looks_like_path(config.base):
        return
    else:
        same = _model_name(config.base) == _model_name(reference)
    if not same:
        raise UpitError(
            f"Checkpoint {config.label} is an adapter for {one_line(config.base)}, not for the "
            f"base_model {reference}; if they are the same model, write {reference}+{config.label}."
        )


def _model_name(reference: str) -> str:
    """Return what tells a Hub id's model; an adapter of a 4-bit one fits the 16-bit one."""
    model = without_four_bits(reference.partition("@")[0])
    return model.rpartition("/")[2].lower()
