"""DARE (arXiv 2311.03099): drop entries of a delta at random, rescale the kept ones.

Which entries are dropped is decided by a counter-based hash of (seed, expert, checkpoint, tensor
name, element index) in 32-bit integer arithmetic, never by a generator with a state: the result
does not depend on threads, on the order of the work, on block sizes or on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from upit_merge.merge.counter_rng import MaskKey, signed

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


@dataclass(frozen=True)
class FallingWords:
    """A mask by words that fall as its number grows, so that few passes make factors of them.

    Twice the number, which drops its top bit, fills a word; -1 minus it is counted from the middle
    of the signed range.

    Attributes:
        multiplier: Of the hash.
        offset: Added to that, int32, (); a tensor, as making one takes as long as half a pass.
        threshold: What is kept is above it.
    """

    multiplier: int
    offset: torch.Tensor
    threshold: int

    @staticmethod
    def of(key: MaskKey, density: float) -> FallingWords:
        """Return those of the mask that `keep_bits` gives."""
        offset = torch.tensor(signed(-2 * key.offset - _INT31 - 1), dtype=torch.int32)
        threshold = _INT31 - 1 - 2 * _limit(density)
        return FallingWords(signed(-2 * key.multiplier), offset, threshold)

    def keep_factors(self, hashed: torch.Tensor, out: torch.Tensor) -> None:
        """Write the bits of a float32 1.0 where an entry is kept, of 0.0 elsewhere; on the CPU.

        `threshold_backward` is a comparison and a choice in one pass, for integers too.
        """
        torch.add(self.offset, hashed, alpha=self.multiplier, out=out)
        _choose(_ONE, out, self.threshold, grad_input=out)


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
    """What one parent gives to a child: weight · DARE(its delta).

    Attributes:
        parent: Its index among the deltas.
        key, density, weight: As `dare` takes them.
    """

    parent: int
    key: MaskKey
    density: float
    weight: float

    @cached_property
    def scale(self) -> float:
        """What kept entries are multiplied by."""
        return self.weight / self.density

    @cached_property
    def words(self) -> FallingWords:
        """Its mask; found once for all blocks of a tensor."""
        return FallingWords.of(self.key, self.density)


class Scratch:
    """Memory for a child of a block, taken again by the next: it is in the processor's cache.

    Args:
        hashed: Of the block, (count,).

    Attributes:
        total: float32, (count,), the sum.
        term: Likewise, one parent's part of it.
        words: int32, (count,).
        factors: The same memory as float32.
    """

    def __init__(self, hashed: torch.Tensor) -> None:
        self.total, self.term = (torch.empty_like(hashed, dtype=torch.float32) for _ in range(2))
        self.words = torch.empty_like(hashed)
        self.factors = self.words.view(torch.float32)


def dare_sum(
    deltas: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
    shares: Sequence[Share],
    hashed: torch.Tensor,
    scratch: Scratch,
) -> torch.Tensor:
    """Compute the delta of a child, the sum of its parents' shares in their order.

    On a CPU a share is three passes over the block, not seven. The bits are those of `dare` and an
    addition: a product with 1 or 0 is exact, so that whether it is fused with the sum is all one.
    (An infinite delta that is dropped becomes NaN: models that far apart have no children.)

    Args:
        deltas: The possible parents', float32, (count,).
        shares: At least one.
        hashed: From `index_hash`, (count,), int32.
        scratch: Is overwritten.

    Returns:
        float32, (count,): `scratch.total`.
    """
    total, words, on_cpu = scratch.total, scratch.words, hashed.device.type == "cpu"
    for count, share in enumerate(shares):
        delta = deltas[share.parent]
        if on_cpu and share.density < 1:
            share.words.keep_factors(hashed, words)
            # A CUDA kernel multiplies in another order and would round once where this does twice.
            start = total if count else _ZERO
            torch.addcmul(start, delta, scratch.factors, value=share.scale, out=total)
            continue
        out = scratch.term if count else total
        dare(delta, hashed, share.key, share.density, share.weight, out, words)
        if count:
            total.add_(scratch.term)
    return total
