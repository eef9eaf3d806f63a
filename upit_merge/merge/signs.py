"""Signs, before any data is seen, of whether a mixture of these checkpoints can be worth its bytes.

What the Gram matrix of the deltas and the trainer's own notes say. They cost nothing beside pass 1
but a look at some rows of the base; what they cannot tell, `upit-merge plan --data` does.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from upit_merge.errors import runs
from upit_merge.io.trainer_state import TrainerState, read_trainer_state
from upit_merge.merge.inputs import Inputs
from upit_merge.merge.rate_signs import rate_sentences
from upit_merge.merge.similarity import cosine, squared_distance

# Cosine from which deltas count as nearly parallel. Neighbours in the runs of our benchmarks stay below
# 0.91; pulled together until it is 0.99, little is left for a choice to gain (docs/method.md).
PARALLEL = 0.99
# And up to which nearly orthogonal: fine-tunes on unlike text had 0.007 to 0.096.
ORTHOGONAL = 0.1
# Longest through shortest delta, up to which all count as of like length.
_LIKE_LENGTH = 1.5
# How much shorter than the longest before it a run's last delta is, if the run has turned back;
# along a run that goes on learning norms only grow.
_SHRUNK = 0.95
# Neighbours of one run have at least this cosine; else they are not one run, whatever their names.
_ONE_RUN = 0.3
# Squared distance, of the squared norm, below which two checkpoints are one, to rounding.
_EQUAL = 1e-12
# Rows of a tensor of the base that its norm is estimated by, in pieces spread over it.
_ROWS, _PIECES = 64, 8
_STEP = re.compile(r"checkpoint-(\d{1,12})")
_PAIRS_TOLD = 3


@dataclass(frozen=True)
class Sign:
    """Is something that can be seen before any data.

    Attributes:
        kind: A word or two that name it.
        checkpoints: Their indices.
        text: One sentence: the numbers, what they mean, what to do.
    """

    kind: str
    checkpoints: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Signs:
    """Holds all that can be seen before any data.

    Attributes:
        norms: Of the deltas, relative to the norm of the base's FFN weights, (num_checkpoints,).
    """

    norms: list[float]
    signs: list[Sign]

    def lines(self) -> Iterator[str]:
        """Yield what `plan` prints."""
        if not self.norms:
            return
        told = ", ".join(f"{index}: {_percent(norm)}" for index, norm in enumerate(self.norms))
        yield f"Length of the deltas, relative to the base's FFN weights: {told}."
        yield from (sign.text for sign in self.signs)


def signs_of(inputs: Inputs, gram: torch.Tensor) -> Signs:
    """Look at opened checkpoints before any data; nothing is said of copies, which have no deltas.

    Args:
        gram: Of all FFN tensors, (num_tensors, num_checkpoints, num_checkpoints).
    """
    if inputs.recipe.parameters.expansion == "copy":
        return Signs([], [])
    total = gram.sum(0)
    origin = base_norm(inputs)
    norms = [norm / origin if origin else 0.0 for norm in _norms(total)]
    notes = {
        index: state
        for index, model in enumerate(inputs.checkpoints)
        if (state := read_trainer_state(model.label, model.folder)) is not None
    }
    folders = [Path(os.path.realpath(model.folder)) for model in inputs.models]
    signs = [
        *equality_signs(total, folders),
        *direction_signs(total, norms),
        *shrinking_signs(total, norms, run_orders(folders[1:], notes)),
        *(Sign(kind, tuple(which), text) for kind, which, text in rate_sentences(notes)),
    ]
    return Signs(norms, signs)


def base_norm(inputs: Inputs) -> float:
    """Return the norm of the base's FFN weights, estimated from rows spread over every tensor.

    Exact for tensors of few rows; of others a few pieces are read, as adapters are compared
    without reading the base at all.
    """
    squares = 0.0
    for _layer, _projection, name in inputs.architecture.ffn_names():
        rows = inputs.base.specs[name].shape[0]
        pieces = min(_PIECES, math.ceil(rows / _ROWS))
        size = min(rows, _ROWS) // pieces
        starts = [(rows - size) * piece // max(1, pieces - 1) for piece in range(pieces)]
        found = sum(
            float(inputs.base.rows(name, start, start + size).double().square().sum())
            for start in starts
        )
        squares += found * rows / (size * pieces)
    return math.sqrt(squares) if math.isfinite(squares) else 0.0


def equality_signs(gram: torch.Tensor, folders: Sequence[Path]) -> Iterator[Sign]:
    """Yield checkpoints with the weights of the base, and of one another.

    Args:
        gram: (num_checkpoints, num_checkpoints).
        folders: Of the base and the checkpoints; that one is listed twice is said elsewhere.
    """
    base, own = folders[0], folders[1:]
    zero = [i for i, norm in enumerate(_norms(gram)) if norm == 0 and own[i] != base]
    if zero:
        yield Sign(
            "equal to the base",
            tuple(zero),
            f"Checkpoint(s) {runs(zero)} have the base's FFN weights, unchanged: as experts they "
            "know nothing that the base does not; leave them out, or see whether their training "
            "changed only other parts.",
        )
    for i, j in _equal_pairs(gram):
        if own[i] != own[j]:
            yield Sign(
                "equal",
                (i, j),
                f"Checkpoints {i} and {j} have the same FFN weights, and would be the same expert "
                "twice; leave one of them out.",
            )


def direction_signs(gram: torch.Tensor, norms: Sequence[float]) -> Iterator[Sign]:
    """Yield what the angles between the deltas say.

    Args:
        gram: (num_checkpoints, num_checkpoints).
        norms: Relative to the base's, for the sentences.
    """
    moved = [i for i, norm in enumerate(_norms(gram)) if norm > 0]
    equal = set(_equal_pairs(gram))
    cosines = cosine(gram)
    pairs = {
        pair: float(cosines[pair]) for pair in itertools.combinations(moved, 2) if pair not in equal
    }
    if not pairs:
        return
    lengths = [norms[i] for i in moved]
    like = max(lengths) <= _LIKE_LENGTH * min(lengths)
    near = {pair: value for pair, value in pairs.items() if value >= PARALLEL}
    span = _span([f"{value:.2f}" for value in sorted(pairs.values())])
    lengths_told = _span([_percent(value) for value in sorted(lengths)])
    if len(near) == len(pairs) and not equal:
        unlike = (
            ""
            if like
            else f" They differ in length ({lengths_told}), which one dense model with a longer or "
            "shorter delta has for half the bytes."
        )
        yield Sign(
            "parallel",
            tuple(moved),
            f"The deltas are nearly parallel (cosine {span}): the experts will be nearly the same, "
            "and a router has little to choose between; take checkpoints further apart, or of runs "
            "on different data, or ask `upit-merge plan --data` whether the average of these does "
            f"as well.{unlike}",
        )
    elif near:
        listed = sorted(near, key=lambda pair: -near[pair])
        told = ", ".join(f"{i} and {j} ({near[i, j]:.3f})" for i, j in listed[:_PAIRS_TOLD])
        more = f" and {len(near) - _PAIRS_TOLD} more pairs" if len(near) > _PAIRS_TOLD else ""
        yield Sign(
            "parallel",
            tuple(sorted({i for pair in near for i in pair})),
            f"Deltas of some checkpoints are nearly parallel (cosine): {told}{more}: as experts "
            "these will be nearly the same; keep one of each pair, and take others that are "
            "further apart.",
        )
    elif max(map(abs, pairs.values())) <= ORTHOGONAL:
        length = "of like length" if like else "of unlike length"
        yield Sign(
            "orthogonal",
            tuple(moved),
            f"The deltas are nearly orthogonal (cosine {span}) and {length} ({lengths_told}): "
            "independent specialists look like this, and so does the noise of models that are not "
            "finished; which they are, `upit-merge plan --data` tells.",
        )


def run_orders(
    folders: Sequence[Path], notes: Mapping[int, TrainerState]
) -> list[list[tuple[int, int]]]:
    """Return the checkpoints that lie together, as (step, checkpoint), in order of steps.

    Args:
        folders: Of the checkpoints.
        notes: Of their trainers, which know the step; else `checkpoint-N` is named by it.
    """
    found: dict[Path, dict[int, int]] = {}
    for index, folder in enumerate(folders):
        named = _STEP.fullmatch(folder.name)
        step = notes[index].step if index in notes else None
        if step is None and named:
            step = int(named[1])
        if step is not None:
            found.setdefault(folder.parent, {}).setdefault(step, index)
    return [sorted(steps.items()) for steps in found.values() if len(steps) > 1]


def shrinking_signs(
    gram: torch.Tensor, norms: Sequence[float], orders: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[Sign]:
    """Yield the runs whose deltas become shorter.

    Args:
        gram: (num_checkpoints, num_checkpoints).
        norms: Relative to the base's.
        orders: See `run_orders`.
    """
    cosines = cosine(gram)
    for order in orders:
        indices = [index for _step, index in order]
        own = [norms[index] for index in indices]
        neighbours = itertools.pairwise(indices)
        longest = max(range(len(own)), key=own.__getitem__)
        if own[-1] >= _SHRUNK * own[longest]:
            continue
        if min(float(cosines[pair]) for pair in neighbours) < _ONE_RUN:
            continue  # not one run
        (first_step, first), (last_step, last) = order[longest], order[-1]
        yield Sign(
            "shrinking",
            tuple(indices[longest:]),
            f"Along the run the deltas shrink, from {_percent(own[longest])} of the base's FFN "
            f"weights (checkpoint {first}, step {first_step:,}) to {_percent(own[-1])} (checkpoint "
            f"{last}, step {last_step:,}): {_WHY_SHRUNK}.",
        )


# A run that goes on learning leaves its base further and further behind.
_WHY_SHRUNK = (
    "it has turned back (to text that it saw before, or pulled to the base by weight decay or a "
    "penalty), or the base is no model that it began with; `upit-merge plan --data` tells which of "
    "its checkpoints predict anything better"
)


def _norms(gram: torch.Tensor) -> list[float]:
    norms: list[float] = gram.diagonal().clamp(min=0).sqrt().tolist()
    return norms


def _equal_pairs(gram: torch.Tensor) -> list[tuple[int, int]]:
    """Return pairs of checkpoints that left the base and have the same weights."""
    distances, own = squared_distance(gram), gram.diagonal()
    return [
        (i, j)
        for i, j in itertools.combinations(range(len(gram)), 2)
        if own[i] > 0 and own[j] > 0 and distances[i, j] <= _EQUAL * max(own[i], own[j])
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _span(told: Sequence[str]) -> str:
    """Return the first and the last of sorted values, once if they read the same."""
    return told[0] if told[0] == told[-1] else f"{told[0]} to {told[-1]}"
