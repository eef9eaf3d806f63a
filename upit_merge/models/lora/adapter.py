"""LoRA adapters as models: their base's tensors, changed as they are read; nothing is merged."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint, is_adapter
from upit_merge.io.hub import OpenOptions, resolve, split_reference
from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec, all_finite
from upit_merge.io.untrusted import check_own_files
from upit_merge.models.dense import diverged
from upit_merge.models.lora.change import Change
from upit_merge.models.lora.config import (
    CONFIG,
    AdapterConfig,
    check_adapter_base,
    read_adapter_config,
)
from upit_merge.models.lora.low_rank import LowRank, add_low_rank, with_magnitudes
from upit_merge.models.lora.tables import EMBEDDINGS, HEAD
from upit_merge.models.lora.tensors import open_weights, read_changes
from upit_merge.models.tables import open_checkpoint

LOG = logging.getLogger(__name__)

# Factors that are kept: blocks come tensor by tensor, a few threads at a time.
_CACHED_TENSORS = 3
_EMBEDDINGS, _HEAD = (f"{table}.weight" for table in (EMBEDDINGS, HEAD))


class Adapter:
    """A LoRA adapter on a base: a `DenseModel` whose tensors are computed row by row.

    Tensors that are changed come in float32: they are rounded once, to the output's dtype.

    Attributes:
        label: The name the recipe gave it.
        folder: Its local folder.
        base: The model it is applied to; stays open when the adapter is closed.
        config: The base's, but for the vocabulary's size and whether head and embeddings are tied.
        specs: The base's, but for the shapes of tensors that are replaced; with a head, if the
            base's was its embeddings and this one's is not.
    """

    def __init__(
        self,
        label: str,
        folder: Path,
        settings: AdapterConfig,
        base: Checkpoint,
        options: OpenOptions,
    ) -> None:
        self.label = label
        self.folder = folder
        self.base = base
        self._file = open_weights(label, folder, options)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, LowRank] = OrderedDict()
        try:
            self._changes = read_changes(label, settings, base, self._file)
        except UpitError:
            self._file.close()
            raise
        changed = {
            name: TensorSpec(name, change.shape, base.specs[change.source].dtype)
            for name, change in self._changes.items()
        }
        self.specs: dict[str, TensorSpec] = {**base.specs, **changed}
        self.config: dict[str, Any] = base.config
        if _EMBEDDINGS in changed or _HEAD in changed:
            self._adapt_tables()

    def _adapt_tables(self) -> None:
        tied = bool(language_settings(self.base.config).get("tie_word_embeddings"))
        tied = tied and _HEAD not in self._changes
        if tied:
            self.specs.pop(_HEAD, None)  # of a copy that some bases have beside their embeddings
        size = self.specs[_EMBEDDINGS].shape[0]
        self.config = self.base.config | {"vocab_size": size, "tie_word_embeddings": tied}

    @property
    def form(self) -> dict[str, list[Any]]:
        """What adapters of one run have in common: ranks, and the modules that are trained."""
        changes = self._changes.items()
        return {
            "rank": sorted({change.rank for _name, change in changes if change.rank}),
            "target modules": sorted({name.split(".")[-2] for name, _change in changes}),
        }

    @property
    def factor_bytes(self) -> int:
        """The largest tensor's factors, in float32."""
        changed = ((self.specs[name].shape, c.rank) for name, c in self._changes.items() if c.rank)
        return max((4 * rank * sum(shape) for shape, rank in changed), default=0)

    @property
    def cached_bytes(self) -> int:
        """What it holds in memory at most."""
        return _CACHED_TENSORS * self.factor_bytes

    def is_low_rank(self, name: str) -> bool:
        """Return whether `low_rank` is all the difference to the base."""
        change = self._changes.get(name)
        return change is None or change.is_low_rank

    def low_rank(self, name: str) -> LowRank | None:
        """Return the factors for a tensor, or None if there are none; thread-safe.

        Raises:
            UpitError: they are NaN or infinite.
        """
        change = self._changes.get(name)
        if change is None or not change.rank:
            return None
        with self._lock:
            factors = self._cache.pop(name, None) or self._read(name, change)
            self._cache[name] = factors
            if len(self._cache) > _CACHED_TENSORS:
                self._cache.popitem(last=False)
        return factors

    def _read(self, name: str, change: Change) -> LowRank:
        parts = change.parts
        if "A" in parts:
            up, down = self._whole(parts["B"]), self._whole(parts["A"])
        else:  # an embedding's factors are those of its transpose
            up, down = self._whole(parts["embedding A"]).T, self._whole(parts["embedding B"]).T
        if not (all_finite(up) and all_finite(down)):
            raise diverged(self, name)
        return LowRank(change.scale, up, down)

    def _whole(self, part: str) -> torch.Tensor:
        return self._file.rows(part, 0, self._file.specs[part].shape[0]).float()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor on the CPU; float32 if it has factors.

        Raises:
            UpitError: they are NaN or infinite. Comparing adapters of one base does not read the
                base, so that this may be the first look at it.
        """
        change = self._changes.get(name)
        parts = change.parts if change else {}
        own = "weight" in parts
        stored = self._stored(name, change, start, stop)
        rows, factors = stored, self.low_rank(name)
        if factors is not None:
            rows = add_low_rank(stored, factors, start)
            if "magnitudes" in parts:
                rows = with_magnitudes(rows, self._file.rows(parts["magnitudes"], start, stop))
        if change is not None and change.tokens:
            rows = self._with_tokens(rows, change, start)
            own = True
        if not all_finite(rows):
            raise diverged(self if own or all_finite(stored) else self.base, name)
        return rows

    def _stored(self, name: str, change: Change | None, start: int, stop: int) -> torch.Tensor:
        """Return what is changed: the adapter's own rows, or the base's, zeros where it has none.

        Such rows are those of new tokens, which the adapter has.
        """
        if change is None:
            return self.base.rows(name, start, stop)
        if "weight" in change.parts:
            return self._file.rows(change.parts["weight"], start, stop)
        spec = self.base.specs[change.source]
        there = min(stop, spec.shape[0])
        if stop == there:
            return self.base.rows(change.source, start, stop)
        rows = torch.zeros(stop - start, *spec.shape[1:], dtype=spec.dtype)
        if start < there:
            rows[: there - start] = self.base.rows(change.source, start, there)
        return rows

    def _with_tokens(self, rows: torch.Tensor, change: Change, start: int) -> torch.Tensor:
        """Put rows of trained tokens in the place of others, in the wider of both dtypes."""
        stop = start + rows.shape[0]
        found = [(row, index) for row, index in change.tokens.items() if start <= row < stop]
        dtype = torch.promote_types(rows.dtype, self._file.specs[change.parts["tokens"]].dtype)
        rows = rows.to(dtype, copy=True)
        for row, index in found:
            rows[row - start] = self._file.rows(change.parts["tokens"], index, index + 1)[0]
        return rows

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU; float32 if it has factors."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def files(self) -> list[Path]:
        """Return the files that decide its weights, the base's among them."""
        return [*self.base.files(), self.folder / CONFIG, self._file.path]

    def small_file(self, name: str) -> Path:
        """Return where a file of its settings is: the base's, if it has none of its own."""
        own = self.folder / name
        return own if own.is_file() else self.base.small_file(name)

    def close(self) -> None:
        self._cache.clear()
        self._file.close()


def open_model(
    reference: str,
    base: Checkpoint | None,
    options: OpenOptions,
    open_complete: Callable[[str, Path], Checkpoint],
) -> DenseModel:
    """Open what an entry of `models:` names: a complete model, an adapter, or `BASE+ADAPTER`.

    Args:
        base: The recipe's, to which an adapter alone is applied; None if there is no such model.
        open_complete: Opens a complete model by its label and folder.

    Raises:
        UpitError: it is neither, or it was trained on another base.
    """
    named, adapter = split_reference(reference)
    if adapter is None:
        folder = resolve(reference, options)
        if not is_adapter(folder):
            return open_checkpoint(reference, folder, options)
        if base is None:
            raise UpitError(
                f"Checkpoint {reference} is an adapter; give its base too, as BASE+{reference}."
            )
        settings = _settings(reference, folder)
        check_adapter_base(settings, base.label, base.folder)
        return Adapter(reference, folder, settings, base, options)
    below = open_complete(named, resolve(named, options, role="adapter's base"))
    folder = resolve(adapter, options, role="adapter")
    if not is_adapter(folder):
        raise UpitError(
            f"{reference} needs an adapter after the +, but {adapter} has no {CONFIG}, or has "
            "complete weights too; give an adapter's folder."
        )
    return Adapter(reference, folder, _settings(reference, folder), below, options)


def _settings(label: str, folder: Path) -> AdapterConfig:
    check_own_files(label, folder)
    return read_adapter_config(label, folder)


def warn_of_unlike_adapters(models: Sequence[DenseModel]) -> None:
    """Say once that adapters of one recipe are not of one kind: it works, but may be a mistake."""
    adapters = [model for model in models if isinstance(model, Adapter)]
    for other in adapters[1:]:
        for what, value in adapters[0].form.items():
            if other.form[what] != value:
                LOG.warning(
                    "Adapters %s and %s differ in %s (%s and %s); their experts differ by more "
                    "than their training data.",
                    adapters[0].label,
                    other.label,
                    what,
                    *(", ".join(map(str, found)) for found in (value, other.form[what])),
                )
                return
