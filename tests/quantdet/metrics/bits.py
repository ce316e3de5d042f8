"""Bit comparison of arrays and digests: is it the same, where does it first differ, and by how much.

Equality is that of the bits, never of the values: -0.0 differs from +0.0, and NaN equals NaN of the same payload. Whether
a NaN may be there at all is the caller's question (`has_nan`), asked before any equality is believed.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# (positions, 32): SHA-256 of the full-vocabulary float32 logits of each position.
Digests: TypeAlias = NDArray[np.uint8]

# The unsigned view of an element, by its size in bytes.
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_INT64_MAX = np.uint64(np.iinfo(np.int64).max)


def first_difference(a: Digests, b: Digests) -> int | None:
    """The first position whose digest differs; None when there is none.

    Args:
        a, b: digests, uint8 (positions, 32). The number of positions may differ: a run that is longer than the other,
            and equal as far as that goes, differs from the first surplus position on.

    Raises:
        ValueError: not digests (uint8, two dimensions), or digests of different widths.
    """
    for digests in (a, b):
        if digests.dtype != np.uint8 or digests.ndim != 2:
            raise ValueError(f"digests are uint8 (positions, 32), not {digests.dtype} {digests.shape}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"digests of {a.shape[1]} and {b.shape[1]} bytes cannot be compared")
    common = min(len(a), len(b))
    differing = np.flatnonzero((a[:common] != b[:common]).any(axis=1))
    if differing.size:
        return int(differing[0])
    return None if len(a) == len(b) else common


def bits_equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays have the same dtype, the same shape and the same bits.

    Raises:
        ValueError: arrays of Python objects, which have no bits to compare.
    """
    if a.dtype.hasobject or b.dtype.hasobject:
        raise ValueError("arrays of objects have no bits to compare")
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(_unsigned(a), _unsigned(b)))


def has_nan(a: NDArray[Any]) -> bool:
    """Whether any element is NaN; integers have none."""
    with np.errstate(invalid="ignore"):  # a signalling bfloat16 NaN would warn
        return bool(np.isnan(a).any())


def ulp_distance(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.int64]:
    """Distance in units in the last place: how many representable numbers of the dtype lie between, plus one.

    The floats of a dtype are numbered in ascending order, and the distance is the difference of these numbers. Adjacent
    numbers are 1 apart, across zero too: -0.0 and +0.0 are one number (0 apart), the smallest subnormals of either sign
    are 2 apart. The infinities follow the largest finite numbers, 1 further on. Distances that int64 cannot hold
    (float64 of opposite signs) are given as its largest value.

    Args:
        a, b: float16, float32, float64 or ml_dtypes.bfloat16, of one dtype and one shape. Use the dtype the numbers
            were computed in: after a widening cast a distance of 1 is thousands.

    Returns:
        int64, of the shape of `a`, in ULP, never negative.

    Raises:
        ValueError: different dtypes or shapes, a dtype that is none of the four, or NaN on either side.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"cannot compare {a.dtype} {a.shape} with {b.dtype} {b.shape}")
    if a.dtype.name not in ("float16", "float32", "float64", "bfloat16") or not a.dtype.isnative:
        raise ValueError(f"ULP are defined for native float16, bfloat16, float32 and float64, not {a.dtype}")
    if has_nan(a) or has_nan(b):
        raise ValueError("NaN has no ULP distance")
    sign_bit = np.uint64(1 << (8 * a.dtype.itemsize - 1))
    bits_a, bits_b = _unsigned(a).astype(np.uint64), _unsigned(b).astype(np.uint64)
    # IEEE magnitudes ascend with their bits, so the bits without the sign number the floats outwards from zero.
    magnitude_a, magnitude_b = bits_a & (sign_bit - np.uint64(1)), bits_b & (sign_bit - np.uint64(1))
    same_side = (bits_a & sign_bit) == (bits_b & sign_bit)
    apart = np.maximum(magnitude_a, magnitude_b) - np.minimum(magnitude_a, magnitude_b)
    across = magnitude_a + magnitude_b  # two magnitudes below 2^63 fit uint64
    distance: NDArray[np.int64] = np.minimum(np.where(same_side, apart, across), _INT64_MAX).astype(np.int64)
    return distance.reshape(a.shape)


def distinct(outputs: Sequence[bytes]) -> list[int]:
    """The group of each output; groups are numbered in order of first appearance (`[0, 0, 1, 0]`).

    The number of different outputs is `max(...) + 1`, of an empty sequence 0.
    """
    groups: dict[bytes, int] = {}
    return [groups.setdefault(output, len(groups)) for output in outputs]


def stable_topk(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Sort each row by descending logprob, then ascending id.

    Engines do not define the order of equal logprobs; after this, equal sets of (id, logprob) have equal bytes.

    Args:
        ids: token ids, int32 (positions, k).
        logprobs: in nats, float32 (positions, k). NaN sorts last.

    Returns:
        `(ids, logprobs)`, new arrays of the same shapes and dtypes.

    Raises:
        ValueError: shapes differ or are not two-dimensional.
    """
    if ids.ndim != 2 or ids.shape != logprobs.shape:
        raise ValueError(f"ids and logprobs are (positions, k), not {ids.shape} and {logprobs.shape}")
    order = np.lexsort((ids, -logprobs), axis=-1)
    return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logprobs, order, axis=-1)


def _unsigned(a: NDArray[Any]) -> NDArray[Any]:
    """The bits as unsigned integers; elements of unusual size as bytes."""
    return np.ascontiguousarray(a).view(_UNSIGNED.get(a.dtype.itemsize, np.uint8))
