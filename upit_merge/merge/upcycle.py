"""Copies of a checkpoint, made unlike: noise, and intermediate dimensions drawn anew.

Noise is the option of sparse upcycling (arXiv 2212.05055), drawing anew is Drop-Upcycling (arXiv
2502.19261): of every expert and layer a random share of the FFN's intermediate dimensions, the
same ones in all three projections, starts from numbers that are distributed as the weights were.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from upit_merge.config.recipe import Parameters
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import row_blocks
from upit_merge.merge.blocks import SUM_BLOCK_ELEMENTS
from upit_merge.merge.counter_rng import index_hash, mask_key, normals
from upit_merge.merge.similarity import not_finite
from upit_merge.models.dense import DenseArchitecture

# What is measured twice is read twice: as many as are worked on at a time, and not a model's.
_MOST_KEPT = 64


@lru_cache(maxsize=256)
def chosen_dimensions(seed: int, expert: int, layer: int, share: float, size: int) -> torch.Tensor:
    """Intermediate dimensions that one expert draws anew in one layer.

    Returns:
        int64 on the CPU, ascending, (floor(share · size),): those with the smallest hashes.
    """
    count = math.floor(share * size + 1e-9)  # 0.29 · 100 is a little less than 29
    hashed = index_hash(mask_key(seed, "drawn anew", expert, layer), 0, size, "cpu")
    return hashed.argsort()[:count].sort().values


@dataclass(frozen=True)
class Moments:
    """Sums of a tensor's weights by intermediate dimension, of which those of any subset follow.

    Attributes:
        sums: float64, (intermediate_size,).
        squares: Of the squared weights, likewise.
        width: Weights per dimension.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    width: int

    def mean_and_deviation(self, dimensions: torch.Tensor | None = None) -> tuple[float, float]:
        """Mean and standard deviation of the weights of some dimensions, or of all.

        Six digits of them, so that differently ordered sums on another machine come to the same.
        """
        sums, squares = self.sums, self.squares
        if dimensions is not None:
            sums, squares = sums[dimensions], squares[dimensions]
        count = len(sums) * self.width
        mean = float(sums.sum()) / count
        variance = max(0.0, float(squares.sum()) / count - mean**2)
        return float(f"{mean:.6g}"), float(f"{math.sqrt(variance):.6g}")


def measure_moments(checkpoint: DenseModel, name: str, *, by_row: bool) -> Moments:
    """Read a whole FFN tensor once, block by block.

    Args:
        by_row: Its rows are the intermediate dimensions (gate_proj, up_proj), not its columns.

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    spec = checkpoint.specs[name]
    axis = 0 if by_row else 1
    sums, squares = (torch.zeros(spec.shape[axis], dtype=torch.float64) for _ in range(2))
    for start, stop in row_blocks(spec, SUM_BLOCK_ELEMENTS):
        rows = checkpoint.rows(name, start, stop)
        values = rows.double()
        part = slice(start, stop) if by_row else slice(None)
        sums[part] += values.sum(1 - axis)
        squares[part] += values.square().sum(1 - axis)
        if not squares[part].isfinite().all():
            raise not_finite([checkpoint], [rows], name)
    return Moments(sums, squares, spec.shape[1 - axis])


@dataclass
class _Measured:
    """Moments that the first thread that wants them measures, while others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    moments: Moments | None = None


class Perturbation:
    """Makes every copy its own: pure functions of seed, expert, tensor name and element index.

    Args:
        checkpoints: Of which the experts are copies.
        architecture: Names the FFN tensors.
        parameters: `noise`, `reinitialise` and the seed.
    """

    def __init__(
        self,
        checkpoints: Sequence[DenseModel],
        architecture: DenseArchitecture,
        parameters: Parameters,
    ) -> None:
        self._checkpoints = checkpoints
        self._tensors = tuple(architecture.ffn_names())
        self._noise = float(parameters.noise)
        self._share = float(parameters.reinitialise)
        self._seed = parameters.seed
        self._lock = threading.Lock()
        self._measured: OrderedDict[tuple[int, int], _Measured] = OrderedDict()

    @staticmethod
    def of(
        checkpoints: Sequence[DenseModel], architecture: DenseArchitecture, parameters: Parameters
    ) -> Perturbation | None:
        """None if the experts are to stay what they are."""
        if not perturbs(parameters):
            return None
        return Perturbation(checkpoints, architecture, parameters)

    def block(
        self,
        tensor: int,
        first_element: int,
        checkpoints: Mapping[int, torch.Tensor],
        copies: Mapping[int, int],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (expert, values) for a block of rows of one FFN tensor.

        A weight w of a copy becomes w + noise · std · z, or, if its dimension is drawn anew,
        mean + std · z with mean and std those of the weights that are replaced; z is normal.

        Args:
            tensor: Its index.
            first_element: Of the block, in the flattened tensor.
            checkpoints: Values by checkpoint, stored dtype, (rows, columns).
            copies: By expert to make, the checkpoint it is a copy of.

        Yields:
            float32, (rows, columns); every operation is a single rounded one.
        """
        layer, projection, name = self._tensors[tensor]
        by_row = projection != "down_proj"
        hashed: torch.Tensor | None = None
        for expert, checkpoint in copies.items():
            source = checkpoints[checkpoint]
            if hashed is None:
                key = mask_key(self._seed, "element", name)
                hashed = index_hash(key, first_element, source.numel(), source.device)
                hashed = hashed.view_as(source)
            moments = self._moments(checkpoint, tensor)
            values = source.to(torch.float32, copy=True)
            if self._noise:
                _mean, deviation = moments.mean_and_deviation()
                noise = normals(hashed, self._seed, expert, "noise", name)
                values.add_(noise.mul_(self._noise * deviation))
            chosen = chosen_dimensions(self._seed, expert, layer, self._share, len(moments.sums))
            mean, deviation = moments.mean_and_deviation(chosen) if len(chosen) else (0.0, 0.0)
            if by_row:
                start = first_element // source.shape[1]
                chosen = chosen[(chosen >= start) & (chosen < start + len(source))] - start
            if len(chosen):
                axis, chosen = (0 if by_row else 1), chosen.to(source.device)
                picked = hashed.index_select(axis, chosen)
                fresh = normals(picked, self._seed, expert, "drawn anew", name)
                values.index_copy_(axis, chosen, fresh.mul_(deviation).add_(mean))
            yield expert, values

    def _moments(self, checkpoint: int, tensor: int) -> Moments:
        """Measured when they are first wanted: the tensor's pages are then in memory anyway."""
        with self._lock:
            entry = self._measured.setdefault((checkpoint, tensor), _Measured())
            self._measured.move_to_end((checkpoint, tensor))
            if len(self._measured) > _MOST_KEPT + 4 * len(self._checkpoints):
                self._measured.popitem(last=False)
        with entry.lock:
            if entry.moments is None:
                _layer, projection, name = self._tensors[tensor]
                by_row = projection != "down_proj"
                model = self._checkpoints[checkpoint]
                entry.moments = measure_moments(model, name, by_row=by_row)
            return entry.moments


def perturbs(parameters: Parameters) -> bool:
    """Return whether experts are changed copies."""
    return bool(parameters.noise or parameters.reinitialise)
