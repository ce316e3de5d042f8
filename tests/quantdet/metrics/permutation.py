"""Do two sets of repeats come from one distribution? An exact permutation test on their distances."""

import math
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

# 8 + 8 repeats have 12870 partitions; 10 + 10 would have 184756, and there are hundreds of pairs.
MOST_REPEATS = 8
# Statistics that differ by no more than this, relative to the largest distance, are equal: sums in another order.
_EQUAL = 1e-12


def two_samples(distances: NDArray[np.float64], first: int) -> float:
    """p-value of the energy statistic: the share of partitions whose statistic is at least the observed one.

    Source: Székely and Rizzo (2004), "Testing for equal distributions in high dimension"; here every partition is counted,
    so that the p-value is exact. It assumes that repeats are exchangeable. The self-tests compare it with
    `scipy.stats.permutation_test`, which takes hundreds of times longer.

    Args:
        distances: (n, n), symmetric, not negative: between all repeats, those of the first format before the others'.
        first: how many belong to the first format; 1 to n - 1.

    Raises:
        ValueError: a distance is not finite, or a format has no repeat.
    """
    n = len(distances)
    if not 0 < first < n or not np.isfinite(distances).all():
        raise ValueError(f"needs finite distances and repeats of both formats, have {first} of {n}")
    chosen = _partitions(n, first)
    rest = 1 - chosen
    x, y = chosen / first, rest / (n - first)  # weights: each statistic is a mean
    within = ((x @ distances) * x).sum(axis=1) + ((y @ distances) * y).sum(axis=1)
    energy = 2 * ((x @ distances) * y).sum(axis=1) - within  # the first partition is the observed one
    return float((energy >= energy[0] - _EQUAL * max(1.0, float(distances.max()))).mean())


@cache
def _partitions(n: int, first: int) -> NDArray[np.float64]:
    """0 or 1, (number of partitions, n): what belongs to the first format; the first row is the observed partition."""
    rows = np.zeros((math.comb(n, first), n))
    for row, members in zip(rows, combinations(range(n), first), strict=True):
        row[list(members)] = 1
    return rows


def smallest(n: int, m: int) -> float:
    """The smallest p-value of `n` and `m` repeats; equal numbers cannot tell a partition from its mirror image."""
    return (2 if n == m else 1) / math.comb(n + m, n)
