"""Random numbers without a generator's state, the same bits on every device.

Each is a function of a name and of the element's index, so that blocks, threads and devices do not
matter: hashes for DARE's masks and for choices, and normally distributed numbers. These are sums of
integers: logarithms and cosines differ between devices in their last bits.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch

_INT32 = 1 << 32


def signed(value: int) -> int:
    """Return the int32 with the same bits as a 32-bit unsigned integer."""
    value %= _INT32
    return value - _INT32 if value >= _INT32 // 2 else value


# The constants of the "lowbias32" integer hash, found by search for low avalanche bias
# (C. Wellons, "Prospecting for Hash Functions", 2018).
MULTIPLIER_1 = signed(0x7FEB352D)
_MULTIPLIER_2 = signed(0x846CA68B)


@dataclass(frozen=True)
class MaskKey:
    """Names a mask: an odd multiplier and an offset, 32 bits each, as signed integers."""

    multiplier: int
    offset: int


def mask_key(*parts: object) -> MaskKey:
    """Return a key from anything that names a mask, e.g. (seed, expert, checkpoint, tensor).

    Parts are hashed with their lengths, so that ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    multiplier, offset = struct.unpack("<II", digest.digest()[:8])
    return MaskKey(signed(multiplier | 1), signed(offset))


def xor_shift_right(x: torch.Tensor, bits: int, work: torch.Tensor) -> torch.Tensor:
    """x ^= x >> bits with a logical shift, which torch does not have for int32; in place."""
    torch.bitwise_right_shift(x, bits, out=work)
    return x.bitwise_xor_(work.bitwise_and_((1 << (32 - bits)) - 1))


def index_hash(key: MaskKey, start: int, count: int, device: torch.device | str) -> torch.Tensor:
    """Well-mixed 32-bit values of the element indices [start, start + count), int32, (count,).

    Computed once per block and shared by all masks of it; `keep_bits` turns it into one.
    """
    x = torch.arange(count, dtype=torch.int32, device=device).add_(signed(start))
    x.bitwise_xor_(key.offset)
    work = torch.empty_like(x)
    xor_shift_right(x, 16, work).mul_(MULTIPLIER_1)
    xor_shift_right(x, 15, work).mul_(_MULTIPLIER_2)
    return xor_shift_right(x, 16, work)


_WORDS = 6  # hashed, 32 bits each


def normals(hashed: torch.Tensor, *name: object) -> torch.Tensor:
    """Return numbers of mean 0 and variance 1 (short of 2^-32), nearly normal.

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
