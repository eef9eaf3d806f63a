"""Dense models under other names and cut otherwise than their files have them; nothing is copied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.models.families import DenseFamily
from upit_merge.models.formats import PROJECTIONS, ffn_tensor, mixture_layers, shared_tensor


@dataclass(frozen=True)
class _Cut:
    """Which part of a stored tensor one is: rows, and columns of them; zeros may follow."""

    stored: str
    rows: tuple[int, int]
    columns: slice | None = None
    padded: tuple[int, int] | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        if self.padded is not None:
            return self.padded
        first, last = self.rows
        rest = stored[1:]
        if self.columns is not None:
            rest = (len(range(*self.columns.indices(stored[1]))),)
        return (last - first, *rest)


class View:
    """A dense model whose tensors are others', or parts of them: a `DenseModel`.

    Attributes:
        seen: The model whose tensors are read.
        specs: Of the tensors as they are cut.
    """

    def __init__(self, seen: DenseModel, cuts: Mapping[str, _Cut]) -> None:
        self.seen = seen
        self._cuts = cuts
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(
                name,
                cut.shape(seen.specs[cut.stored].shape),
                seen.specs[cut.stored].dtype,
            )
            for name, cut in cuts.items()
        }

    @property
    def label(self) -> str:
        return self.seen.label

    @property
    def folder(self) -> Path:
        return self.seen.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.seen.config

    def files(self) -> list[Path]:
        """Return the files that decide its weights."""
        return self.seen.files()

    def small_file(self, name: str) -> Path:
        """Return where a file of its settings is, if it has one."""
        return self.seen.small_file(name)

    def close(self) -> None:
        self.seen.close()

    def whole(self, name: str) -> str | None:
        """Return which stored tensor one is all of, if it is."""
        cut = self._cuts[name]
        is_all = self.specs[name].shape == self.seen.specs[cut.stored].shape
        return cut.stored if is_all else None

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor on the CPU, in its stored dtype or a wider one."""
        cut = self._cuts[name]
        if cut.padded is not None:
            return self._padded(cut, start, stop)
        rows = self.seen.rows(cut.stored, cut.rows[0] + start, cut.rows[0] + stop)
        return rows if cut.columns is None else rows[:, cut.columns]

    def _padded(self, cut: _Cut, start: int, stop: int) -> torch.Tensor:
        last = cut.rows[1]
        stored = self.seen.rows(cut.stored, min(start, last), min(stop, last))
        rows = stored.new_zeros(stop - start, cut.shape(())[1])
        rows[: len(stored), : stored.shape[1]] = stored
        return rows

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, in its stored dtype or a wider one."""
        return self.rows(name, 0, self.specs[name].shape[0])


def cut_pieces(model: DenseModel, family: DenseFamily, settings: Mapping[str, Any]) -> View:
    """Return a model as a Llama has its tensors: by these names, none of them fused.

    Args:
        settings: The model's, see `DenseFamily.settings`.
    """
    cuts: dict[str, _Cut] = {}
    for name, spec in model.specs.items():
        pieces = family.pieces(name, settings)
        if pieces is None:
            cuts[name] = _Cut(name, (0, spec.shape[0]))
            continue
        for piece in pieces:
            if fits := piece.padded and len(spec.shape) == 2:
                fits = all(a <= b for a, b in zip(spec.shape, piece.padded, strict=True))
            rows = piece.rows or (0, spec.shape[0])
            # What is shorter than its configuration says must not be read beyond its end.
            cuts[piece.name] = _Cut(
                name,
                (min(rows[0], spec.shape[0]), min(rows[1], spec.shape[0])),
                padded=piece.padded if fits else None,
            )
    return View(model, cuts)


def split_ffn(model: DenseModel, settings: Mapping[str, Any]) -> DenseModel:
    """Return a model whose FFNs are cut into a shared half and one that becomes an expert.

    The FFN of all intermediate dimensions is the sum of that of the first half of them and that of
    the second, whatever the activation.

    Args:
        model: As a Llama.
        settings: Of the mixture; it is cut where `shared` is `split`.
    """
    if settings["shared"] != "split":
        return model
    half = int(settings["intermediate_size"]) // 2
    cuts = {name: _Cut(name, (0, spec.shape[0])) for name, spec in model.specs.items()}
    for layer, projection in itertools.product(mixture_layers(settings), PROJECTIONS):
        name = ffn_tensor(layer, projection)
        whole = cuts[name].rows
        is_down = projection == "down_proj"
        cuts[shared_tensor(layer, projection)] = (
            _Cut(name, whole, slice(0, half)) if is_down else _Cut(name, (0, half))
        )
        cuts[name] = (
            _Cut(name, whole, slice(half, None)) if is_down else _Cut(name, (half, whole[1]))
        )
    return View(model, cuts)


def stored_model(model: DenseModel) -> DenseModel:
    """Return the model that is behind all views of it."""
    while isinstance(model, View):
        model = model.seen
    return model


def stored_tensor(model: DenseModel, name: str) -> str | None:
    """Return which tensor of the model behind all views is all of this one; None if none is."""
    found: str | None = name
    while isinstance(model, View) and found is not None:
        found, model = model.whole(found), model.seen
    return found
