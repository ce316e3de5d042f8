"""A compact fingerprint of hidden states: each position's residual stream, projected at random onto a few dimensions.

Source: Johnson and Lindenstrauss (1984), with the signs of Achlioptas (2003): for R of independent +1 and -1, the squared
length of x R / sqrt(k) is that of x in expectation, with a relative standard deviation below sqrt(2 / k) (0.35 for k = 16,
so 0.18 of a length; means over positions and layers are as much closer). Lengths of differences are kept in the same way,
since the projection is linear and every machine has the same R.

A position is divided by its own length first: a distance is then relative to the stream with no noise from a projected
denominator, and large values do not leave float16. What is lost is the scale, which the norm in front of the next layer takes
out anyway. float16 rounds by up to 2^-11 of a value, as a stream that is computed in float16 itself is rounded.

R comes from raw Philox words, keyed with the SHA-256 of a name and the width, as weights do in `checkpoints.synthetic`. It
is public: a fingerprint tells formats apart, it proves nothing about who made it.
"""

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "rademacher-v1"
DIMS = 16
MOST_LAYERS = 8  # all of them up to here; of deeper models the first, the middle and the last


@lru_cache(maxsize=4)
def signs(width: int) -> NDArray[np.float64]:
    """R for hidden states of `width` elements: +1 and -1, (width, DIMS)."""
    key = int.from_bytes(hashlib.sha256(f"quantdet-{NAME}/{width}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-width * DIMS // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: width * DIMS]
    return bits.reshape(width, DIMS).astype(np.float64) * 2 - 1


def project(rows: NDArray[Any]) -> NDArray[np.float16]:
    """Fingerprints of hidden states (n, width), float16 (n, DIMS) of expected length 1; of a position of zeros, zeros.

    Summed in float64, so that the order in which a machine adds does not reach float16.
    """
    exact = rows.astype(np.float64)
    length = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    projected: NDArray[np.float64] = exact @ signs(exact.shape[1]) / (np.where(length, length, 1.0) * math.sqrt(DIMS))
    return projected.astype(np.float16)


def kept(layers: int) -> tuple[int, ...]:
    """Which of so many decoder layers are projected."""
    return tuple(range(layers)) if layers <= MOST_LAYERS else (0, layers // 2, layers - 1)


def distance(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    """Mean over layers and positions of the L2 distance of two fingerprints (layers, positions, DIMS): about the relative
    L2 distance of the hidden states, scale left out; 0 to about 2.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"fingerprints of {a.shape} and {b.shape} cannot be compared")
    return float(np.sqrt(np.square(a.astype(np.float64) - b).sum(axis=-1)).mean())
