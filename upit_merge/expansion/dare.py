"""DARE (arXiv 2311.03099): drop entries of a delta at random, rescale the kept ones.

Which entries are dropped is decided by a counter-based hash of (seed, expert, checkpoint, tensor
name, element index) in 32-bit integer arithmetic, never by a generator with a state: the result
does not depend on threads, on the order of the work, on block sizes or on the device.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch

_INT31 = 1 << 31
_INT32 = 1 << 32


def _signed(value: int) -> int:
    """The int32 with the same bits as a 32-bit unsigned integer."""
    value %= _INT32
    return value - _INT32 if value >= _INT32 // 2 else value


# The constants of the "lowbias32" integer hash, found by search for low avalanche bias
# (C. Wellons, "Prospecting for Hash Functions", 2018).
MULTIPLIER_1 = _signed(0x7FEB352D)
_MULTIPLIER_2 = _signed(0x846CA68B)


@dataclass(frozen=True)
class MaskKey:
    """Names a mask: an odd multiplier and an offset, 32 bits each, as signed integers."""

    multiplier: int
    offset: int


def mask_key(*parts: object) -> MaskKey:
    """A key from anything that names a mask, e.g. (seed, expert, checkpoint, tensor).

    Parts are hashed with their lengths, so that ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    multiplier, offset = struct.unpack("<II", digest.digest()[:8])
    return MaskKey(_signed(multiplier | 1), _signed(offset))


def xor_shift_right(x: torch.Tensor, bits: int, work: torch.Tensor) -> torch.Tensor:
    """x ^= x >> bits with a logical shift, which torch does not have for int32; in place."""
    torch.bitwise_right_shift(x, bits, out=work)
    return x.bitwise_xor_(work.bitwise_and_((1 << (32 - bits)) - 1))


def index_hash(key: MaskKey, start: int, count: int, device: torch.device | str) -> torch.Tensor:
    """Well-mixed 32-bit values of the element indices [start, start + count), int32, (count,).

    Computed once per block and shared by all masks of it; `keep_bits` turns it into one.
    """
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start))
    x.bitwise_xor_(key.offset)
    work = torch.empty_like(x)
    xor_shift_right(x, 16, work).mul_(MULTIPLIER_1)
    xor_shift_right(x, 15, work).mul_(_MULTIPLIER_2)
    return xor_shift_right(x, 16, work)


def keep_bits(
    hashed: torch.Tensor, key: MaskKey, density: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Which entries DARE keeps, each with probability `density`, as words of ones or zeros.

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
