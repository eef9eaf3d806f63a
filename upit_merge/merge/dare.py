"""DARE (arXiv 2311.03099): drop entries of a delta at random, rescale the kept ones.

Which entries are dropped is decided by a counter-based hash of (seed, expert, checkpoint, tensor
name, element index) in 32-bit integer arithmetic, never by a generator with a state: the result
does not depend on threads, on the order of the work, on block sizes or on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from upit_merge.merge.counter_rng import MaskKey

_INT31 = 1 << 31
_ONE = torch.tensor(1.0).view(torch.int32)
_ZERO = torch.tensor(0.0)
_choose = torch.ops.aten.threshold_backward.grad_input


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
    x.bitwise_and_(_INT31 - 1).sub_(_limit(density))
    return x.bitwise_right_shift_(31)


def _limit(density: float) -> int:
    """Return how many of the 2^31 numbers an entry is kept at."""
    return min(round(density * _INT31), _INT31 - 1)


def keep_factors(
    hashed: torch.Tensor, key: MaskKey, density: float, out: torch.Tensor
) -> torch.Tensor:
    """Return the mask of `keep_bits` as factors, in two passes instead of four.

    `threshold_backward` is a comparison and a choice in one, for integers too: it gives the bits of
    1.0 where a word is above the threshold, which is where the number is below its limit.

    Args:
        hashed, key, density, out: As `keep_bits` takes them; on the CPU.

    Returns:
        float32, (count,), the memory of `out`; 1 where kept and 0 elsewhere.
    """
    multiplier, offset = key.falling
    torch.add(offset, hashed, alpha=multiplier, out=out)
    _choose(_ONE, out, _INT31 - 1 - 2 * _limit(density), grad_input=out)
    return out.view(torch.float32)


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


@dataclass(frozen=True)
class Share:
    """What one parent gives to a child: weight · DARE(delta), as `dare` takes them."""

    delta: torch.Tensor
    key: MaskKey
    density: float
    weight: float


@dataclass(frozen=True)
class Scratch:
    """Memory for a child of a block, taken again by the next: it is in the processor's cache.

    Attributes:
        total: float32, (count,), the sum.
        term: Likewise, one parent's part of it.
        words: int32, (count,).
    """

    total: torch.Tensor
    term: torch.Tensor
    words: torch.Tensor

    @staticmethod
    def like(hashed: torch.Tensor) -> Scratch:
        """Take it for a block of as many elements, on the same device."""
        total, term = (torch.empty_like(hashed, dtype=torch.float32) for _ in range(2))
        return Scratch(total, term, torch.empty_like(hashed))


def dare_sum(shares: Sequence[Share], hashed: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Compute the delta of a child, the sum of its parents' shares in their order.

    On a CPU a share is three passes over the block, not seven. The bits are those of `dare` and an
    addition: a product with 1 or 0 is exact, so that whether it is fused with the sum is all one.
    (An infinite delta that is dropped becomes NaN: models that far apart have no children.)

    Args:
        shares: At least one; deltas float32, (count,).
        hashed: From `index_hash`, (count,), int32.
        scratch: Is overwritten.

    Returns:
        float32, (count,): `scratch.total`.
    """
    total = scratch.total
    for count, share in enumerate(shares):
        if share.density < 1 and total.device.type == "cpu":
            kept = keep_factors(hashed, share.key, share.density, scratch.words)
            # A CUDA kernel multiplies in another order and would round once where this does twice.
            scale = share.weight / share.density
            start = total if count else _ZERO
            torch.addcmul(start, share.delta, kept, value=scale, out=total)
            continue
        out = scratch.term if count else total
        dare(share.delta, hashed, share.key, share.density, share.weight, out, scratch.words)
        if count:
            total.add_(scratch.term)
    return total
