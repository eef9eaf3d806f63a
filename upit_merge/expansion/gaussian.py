"""Normally distributed numbers without a generator's state, the same bits on every device.

As DARE's masks are, each is a function of a name and of the element's index, so that blocks,
threads and devices do not matter. Logarithms and cosines differ between devices in their last
bits; sums of integers do not.
"""

from __future__ import annotations

import torch

from upit_merge.expansion.dare import MULTIPLIER_1, mask_key, xor_shift_right

_WORDS = 6  # hashed, 32 bits each
_HALVES = 2 * _WORDS


def normals(hashed: torch.Tensor, *name: object) -> torch.Tensor:
    """Numbers of mean 0 and variance 1 (short of 2^-32), nearly normal.

    Each is the centred sum of twelve 16-bit uniforms: excess kurtosis -0.1, nothing beyond 6, and
    beyond 3 in absolute value 0.21 % of them instead of 0.27 %; initial weights ask no more. All
    are multiples of 2^-16, exact in float32.

    Args:
        hashed: From `index_hash`, int32, any shape; multiplied, added to and mixed once more for
            every word, which makes numbers of different names independent as far as measured.
        name: Of these numbers, e.g. (seed, expert, tensor).

    Returns:
        float32, of the same shape.
    """
    total = torch.zeros_like(hashed)
    x, work = torch.empty_like(hashed), torch.empty_like(hashed)
    for word in range(_WORDS):
        key = mask_key(*name, word)
        offset = torch.tensor(key.offset, dtype=torch.int32)
        torch.add(offset, hashed, alpha=key.multiplier, out=x)
        xor_shift_right(x, 16, work).mul_(MULTIPLIER_1)
        # The upper half as a signed number, the lower one as an unsigned one.
        total.add_(torch.bitwise_right_shift(x, 16, out=work)).add_(x.bitwise_and_(0xFFFF))
    # Means of the halves: -1/2 and 2^15 - 1/2.
    total.sub_(_WORDS * ((1 << 15) - 1))
    return total.float().mul_(2.0**-16)
