"""fr32 padding with Python's integers: where the native module `_fr32` was not built.

Some hundred chunks become one big integer, 1024 bits each; the four limbs of all of them are cut
out with one mask each and moved with one shift each, at about 100 MB/s. The slices with a step
spread 127 bytes over 128 and back.
"""

from __future__ import annotations

import functools

_DATA = 127
_PADDED = 128
_BLOCK = 256
"""Chunks in one integer: more leave the processor's cache, fewer cost more calls."""


def pad(data: bytes | bytearray | memoryview, out: bytearray | memoryview) -> None:
    """Pad whole chunks of `data` into `out`."""
    source, target = memoryview(data), memoryview(out)
    for first in range(0, len(source) // _DATA, _BLOCK):
        part = source[first * _DATA : (first + _BLOCK) * _DATA]
        count = len(part) // _DATA
        spread = bytearray(count * _PADDED)
        for i in range(_DATA):
            spread[i::_PADDED] = part[i::_DATA]
        bits = int.from_bytes(spread, "little")
        limbs = _limbs(count)
        moved = sum((bits & limb) << 2 * k for k, limb in enumerate(limbs))
        at = first * _PADDED
        target[at : at + len(spread)] = moved.to_bytes(len(spread), "little")


def unpad(data: bytes | bytearray | memoryview, out: bytearray | memoryview) -> int:
    """Unpad whole chunks of `data` into `out`; the position of a byte with a top bit set, or -1."""
    source, target = memoryview(data), memoryview(out)
    for first in range(0, len(source) // _PADDED, _BLOCK):
        part = source[first * _PADDED : (first + _BLOCK) * _PADDED]
        count = len(part) // _PADDED
        bits = int.from_bytes(part, "little")
        limbs = [limb << 2 * k for k, limb in enumerate(_limbs(count))]
        wrong = bits & ~sum(limbs)
        if wrong:
            return first * _PADDED + ((wrong & -wrong).bit_length() - 1) // 8
        moved = sum((bits & limb) >> 2 * k for k, limb in enumerate(limbs))
        spread = moved.to_bytes(len(part), "little")
        packed = bytearray(count * _DATA)
        for i in range(_DATA):
            packed[i::_DATA] = spread[i::_PADDED]
        at = first * _DATA
        target[at : at + len(packed)] = packed
    return -1


@functools.lru_cache(maxsize=4)
def _limbs(count: int) -> tuple[int, ...]:
    """Masks of the first to fourth 254 bits of the data of `count` chunks."""
    limb = (1 << 254) - 1
    return tuple(
        int.from_bytes((limb << 254 * k).to_bytes(_PADDED, "little") * count, "little")
        for k in range(4)
    )
