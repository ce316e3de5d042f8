"""Small unsigned integers in int32 words, the first in the lowest bits."""

import numpy as np

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.tensors import Array

_STRIP = 16  # rows: one cache line of int32 in the transposed matrix


def unsigned(codes: Array, bits: int) -> Array:
    """`codes` as uint8 0 .. 2^bits - 1: symmetric codes (int8) are offset by 2^(bits-1), unsigned ones stay."""
    if codes.dtype == np.uint8:
        return codes
    return (codes.view(np.uint8) + np.uint8(2 ** (bits - 1))).astype(np.uint8, copy=False)


def pack(values: Array, bits: int) -> Array:
    """Pack uint8 values below 2^bits (bits 4 or 8) along the last axis: [..., n] -> int32 [..., n * bits / 32].

    Raises:
        Unavailable: n does not fill whole words.
    """
    per_word = 32 // bits
    if values.shape[-1] % per_word:
        raise Unavailable(
            f"packing {bits}-bit numbers into 32-bit words: need a multiple of {per_word}, have {values.shape[-1]}"
        )
    if bits == 4:
        values = pack_nibbles(values)
    return np.ascontiguousarray(values).view("<i4")


def pack_nibbles(values: Array, *, even_high: bool = False) -> Array:
    """Two uint8 values below 16 a byte, the even one in the low half: [..., n] -> uint8 [..., n / 2]."""
    pairs = np.ascontiguousarray(values).view("<u2")  # two values in one word: no pass with a stride of two
    if even_high:
        packed = pairs << np.uint16(4)
        packed |= pairs >> np.uint16(8)
    else:
        packed = pairs >> np.uint16(4)
        packed |= pairs
    return packed.astype(np.uint8)


def transposed(matrix: Array) -> Array:
    """A contiguous copy of `matrix.T`, by strips of rows: a large one at once misses the cache at every element."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _STRIP):
        out[:, start : start + _STRIP] = matrix[start : start + _STRIP].T
    return out
