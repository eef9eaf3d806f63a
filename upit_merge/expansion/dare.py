"""DARE (arXiv 2311.03099): drop entries of a delta at random, rescale the kept ones.

Which entries are dropped is decided by a counter-based hash of (seed, expert, checkpoint, tensor
name, element index) in 32-bit integer arithmetic, never by a generator with a state: the result
does not depend on threads, on the order of the work, on block sizes or on the device.
"""

from __future__ import annotations

import hashlib

import torch

_INT32 = 1 << 32


def _signed(value: int) -> int:
    """The int32 with the same bits as a 32-bit unsigned integer."""
    value %= _INT32
    return value - _INT32 if value >= _INT32 // 2 else value


# The constants of the "lowbias32" integer hash, found by search for low avalanche bias
# (C. Wellons, "Prospecting for Hash Functions", 2018).
_MULTIPLIER_1 = _signed(0x7FEB352D)
_MULTIPLIER_2 = _signed(0x846CA68B)


def mask_key(*parts: object) -> int:
    """A 32-bit key from anything that names a mask, e.g. (seed, expert, checkpoint, tensor).

    Parts are hashed with their lengths, so that ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return int.from_bytes(digest.digest()[:4], "little")


def _xor_shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x ^= x >> bits with a logical shift, which torch does not have for int32; in place."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def index_hash(key: int, start: int, count: int, device: torch.device | str) -> torch.Tensor:
    """Well-mixed 32-bit values of the element indices [start, start + count), int32, (count,).

    Computed once per block and shared by all masks of it; `keep_mask` turns it into one.
    """
    first = _signed(start)
    x = torch.arange(first, first + count, dtype=torch.int64, device=device).to(torch.int32)
    x.bitwise_xor_(_signed(key))
    _xor_shift_right(x, 16).mul_(_MULTIPLIER_1)
    _xor_shift_right(x, 15).mul_(_MULTIPLIER_2)
    return _xor_shift_right(x, 16)


def keep_mask(hashed: torch.Tensor, key: int, density: float) -> torch.Tensor:
    """Which entries DARE keeps, each with probability `density`.

    Args:
        hashed: From `index_hash`, (count,), int32.
        key: Names the mask; other keys give independent masks.
        density: Share to keep, in (0, 1).

    Returns:
        Boolean tensor, (count,).
    """
    # A second hash, of the first one xor the key. Its last xor-shift would only touch low bits,
    # and the comparison is decided by the high ones.
    x = hashed ^ _signed(key)
    _xor_shift_right(x, 16).mul_(_MULTIPLIER_1)
    _xor_shift_right(x, 15).mul_(_MULTIPLIER_2)
    threshold = min(round(density * _INT32), _INT32 - 1) - _INT32 // 2
    return x < threshold


def dare(
    delta: torch.Tensor, hashed: torch.Tensor, key: int, density: float, weight: float
) -> torch.Tensor:
    """weight · DARE(delta) = weight / density · delta where kept, 0 elsewhere.

    Args:
        delta: Difference to the base, float32, (count,).
        hashed: From `index_hash`, (count,), int32.
        key: Names the mask, see `mask_key`.
        density: Share of entries kept, in (0, 1]; 1 keeps everything.
        weight: The mixing weight of this parent.

    Returns:
        float32, (count,); every operation is a single rounded one, so that CPU and CUDA agree.
    """
    scaled = delta * (weight / density)
    if density >= 1:
        return scaled
    # Multiplying by 0 would keep the sign of zero and turn infinities into NaN.
    return scaled.masked_fill_(keep_mask(hashed, key, density).logical_not_(), 0.0)
