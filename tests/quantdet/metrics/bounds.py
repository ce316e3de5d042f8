"""What a number of runs can say: exact binomial bounds on a rate; and p-values of many tests at once."""

import itertools
import math
import operator
from collections.abc import Sequence

# Below this the number of runs is beyond any that could be made, and float64 no longer tells neighbours apart.
_SMALLEST_RATE = 1e-9


def flip_rate_upper(flips: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound on the flip rate, the probability that a run differs from the reference.

    Source: Clopper and Pearson (1934), one-sided; for no flips it is 1 - (1 - confidence)^(1/n), about 3/n at 95 %.
    The runs must be independent: repeats inside one process bound the rate per call, not per process lifetime.

    Args:
        flips: runs that differ, 0 to n.
        n: runs compared with the reference, at least 1.
        confidence: between 0 and 1, both excluded.

    Returns:
        a rate in (0, 1]; 1.0 when every run differs.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `flips` or `n` is not a whole number.
    """
    flips, n = operator.index(flips), operator.index(n)
    if not 0 <= flips <= n or n < 1:
        raise ValueError(f"flips must be 0 to n and n at least 1; they are {flips} and {n}")
    _check_confidence(confidence)
    if flips == n:
        return 1.0
    if flips == 0:
        # 1 - (1 - confidence)^(1/n), without losing the digits of a small rate.
        return -math.expm1(math.log1p(-confidence) / n)
    # Imported here since most cells have no flips. The quantile of Beta(flips + 1, n - flips).
    from scipy.special import betaincinv

    return float(betaincinv(flips + 1, n - flips, confidence))


def runs_needed(max_flip_rate: float, confidence: float = 0.95) -> int:
    """Smallest number of runs that, all of them equal, bounds the flip rate by `max_flip_rate` (0.01 at 95 %: 299).

    Args:
        max_flip_rate: 1e-9 to 1, 1 excluded.
        confidence: between 0 and 1, both excluded.

    Raises:
        ValueError: an argument is out of range.
    """
    if not _SMALLEST_RATE <= max_flip_rate < 1:
        raise ValueError(f"max_flip_rate must be in [{_SMALLEST_RATE:g}, 1); it is {max_flip_rate!r}")
    _check_confidence(confidence)
    estimate = math.log1p(-confidence) / math.log1p(-max_flip_rate)
    # The quotient may round to either side of a whole number, so the bound itself decides.
    candidates = itertools.count(max(1, math.ceil(estimate) - 1))
    return next(n for n in candidates if flip_rate_upper(0, n, confidence) <= max_flip_rate)


def rate_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided bounds on a rate from `hits` of `n`: one-sided ones either way, each with half of the doubt.

    Source: Clopper and Pearson (1934); exact, so the rate is inside at least `confidence` of the time.

    Raises:
        ValueError, TypeError: as `flip_rate_upper`.
    """
    _check_confidence(confidence)
    one_sided = (1 + confidence) / 2
    return 1 - flip_rate_upper(n - hits, n, one_sided), flip_rate_upper(hits, n, one_sided)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: whatever is true, rejecting those at most alpha errs with probability alpha.

    Source: Holm (1979), step-down; no assumption about dependence.

    Args:
        p_values: 0 to 1, in any order.

    Returns:
        the adjusted values in the order given, none smaller than before.

    Raises:
        ValueError: a value is out of range.
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values must be from 0 to 1; among them is {wrong[0]!r}")
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, p_values[at] * (len(p_values) - rank)))
        adjusted[at] = so_far
    return adjusted


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1; it is {confidence!r}")
