"""Whether the base is likely to be the model that the checkpoints were trained from."""

from __future__ import annotations

import logging

import torch

from upit_merge.merge.inputs import Inputs
from upit_merge.merge.similarity import cosine

LOG = logging.getLogger(__name__)

# Deltas share most of one direction from this mean cosine on: what all of them have in common is
# then as long as what each has of its own.
_SHARED = 0.5
# Of what a checkpoint had learned, how much the next one of the same run still has at least.
_KEPT = 0.75


def looks_foreign(gram: torch.Tensor) -> bool:
    """Return whether deltas look as if they were measured from a model beside their origin.

    All of them then have the way from that model to the origin in common. So have those of one
    run from the right base; but there each checkpoint keeps what those before it have learned,
    <d_i, d_i+1> being about <d_i, d_i> or more, and a checkpoint nearer to a wrong base does not.

    Args:
        gram: Inner products of the deltas in the order of the recipe, (num_checkpoints,
            num_checkpoints).
    """
    count = len(gram)
    own = gram.diagonal()
    if count < 2 or not bool((own > 0).all()):
        return False
    between = cosine(gram)[~torch.eye(count, dtype=torch.bool)]
    kept = gram.diagonal(offset=1) / own[:-1]
    return bool(between.mean() >= _SHARED and kept.min() < _KEPT)


def warn_of_foreign_base(inputs: Inputs, gram: torch.Tensor) -> None:
    """Say that `base_model` may be a wrong one; it works, but deltas then mean something else.

    Args:
        gram: Of all FFN tensors, (num_tensors, num_checkpoints, num_checkpoints).
    """
    if inputs.recipe.parameters.expansion == "copy":
        return  # nothing is measured against the base
    if looks_foreign(gram.sum(0)):
        LOG.warning(
            "The deltas of all checkpoints share most of one direction, but not as those of one "
            "run do: %s may not be the model they were trained from; give that one as base_model.",
            inputs.base.label,
        )
