"""DARE (arXiv 2311.03099): drop entries of a delta at random, rescale the kept ones.

Which entries are dropped is decided by a counter-based hash of (seed, expert, checkpoint, tensor
name, element index) in 32-bit integer arithmetic, never by a generator with a state: the result
does not depend on threads, on the order of the work, on block sizes or on the device.
"""

from __future__ import annotations

import torch

from upit_merge.merge.counter_rng import (
    MaskKey,
)

_INT31 = 1 << 31


def keep_bits(
    hashed: torch.Tensor, key: MaskKey, density: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return which entries DARE keeps, each with probability `density`, as words of ones or zeros.

    An entry's 31-bit number is multiplier · hash + offset, the top bit dropped (multiply-add
    hashing, in the manner of Dietzfelbinger 1996). That masks of different keys are independent is
    measured, not proven; keys whose multipliers are small multiples of each other would not be.
    Words instead of booleans, because comparisons are what torch does slowest on a CPU.

    Args:
        hashed: From `index_hash`, (count,), int32.
        key: Names the mask.
        density: Share to keep, in (0, 1).
        out: To be filled, (count,), int32.

    Returns:
        int32, (count,); -1, all bits set, where kept and 0 elsewhere.
    """
    offset = torch.tensor(key.offset, dtype=torch.int32)
    x = torch.add(offset, hashed, alpha=key.multiplier, out=out)
    # Both are below 2^31, so that the difference cannot overflow; its sign fills the word.
    x.bitwise_and_(_INT31 - 1).sub_(min(round(density * _INT31), _INT31 - 1))
    return x.bitwise_right_shift_(31)


def dare(
    delta: torch.Tensor,
    hashed: torch.Tensor,
    key: MaskKey,
    density: float,
    weight: float,
    out: torch.Tensor | None = None,
    work: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight · DARE(delta) = weight / density · delta where kept, 0 elsewhere.

    Args:
        delta: Difference to the base, float32, (count,).
        hashed: From `index_hash`, (count,), int32.
        key: Names the mask, see `mask_key`.
        density: Share of entries kept, in (0, 1]; 1 keeps everything.
        weight: The mixing weight of this parent.
        out: To be filled, (count,), float32.
        work: Scratch space, (count,), int32; taken anew if None.

    Returns:
        float32, (count,); every operation is a single rounded one, so that CPU and CUDA agree.
    """
    scaled = torch.mul(delta, weight / density, out=out)
    if density < 1:
        # By bits: multiplying by 0 would keep the sign of zero and turn infinities into NaN.
        scaled.view(torch.int32).bitwise_and_(keep_bits(hashed, key, density, work))
    return scaled
