"""Are tensors of several models the same? Read in pieces, up to the first difference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from upit_merge.io.sources import TensorSource
from upit_merge.io.tensor_file import row_blocks

_COMPARED_ELEMENTS = 1 << 20


def _equal(name: str, ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs)


def have_same_tensors(
    first: TensorSource,
    others: Sequence[TensorSource],
    names: Collection[str],
    agree: Callable[[str, Tensor, Tensor], bool] = _equal,
) -> bool:
    """Return whether all models have what one of them has under some names.

    Training that changes a tensor changes nearly all of it, so that most differences are in the
    first rows of the smallest: small tensors are looked at first.

    Args:
        first: Has all of the names; the others' values are compared in its dtypes.
        agree: Told a name and the same rows of both models, (rows, ...).
    """
    for name in sorted(names, key=lambda name: (first.specs[name].numel, name)) if others else ():
        spec = first.specs[name]
        if any(name not in o.specs or o.specs[name].shape != spec.shape for o in others):
            return False
        for start, stop in row_blocks(spec, _COMPARED_ELEMENTS):
            rows = first.rows(name, start, stop)
            for other in others:
                if not agree(name, rows, other.rows(name, start, stop).to(rows.dtype)):
                    return False
    return True
