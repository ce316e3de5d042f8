"""Distances between two runs' top-k logprobs at the same positions of the same token ids.

Arrays: `ids` int32 (T, k), `logprobs` float32 (T, k), T positions, natural logarithms (nats). The ids of a row are
different and not negative; their order does not matter. The two sides may have different k.

Two metrics are here. `distance` is the suite's: symmetric, and an id that only one side reports still counts.
`published_topk` repeats the published one, so that figures can be set beside the published tables.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Distance:
    """How far two runs' top-k logprobs are apart.

    Attributes:
        l2: mean over positions of the per-position L2, in nats.
        max_abs: largest |difference| of one id at one position, in nats.
        positions: number of positions behind the two figures.
        missing: top-k ids reported by one side only, summed over the positions. These are censored, so with any of
            them the figures are estimates; with none the distance over the reported ids is exact.
    """

    l2: float
    max_abs: float
    positions: int
    missing: int


def union_topk(ids_a: Ids, lp_a: Logprobs, ids_b: Ids, lp_b: Logprobs, mask: Mask | None = None) -> NDArray[np.float64]:
    """Per-position distance over the union of the two sides' top-k ids.

    An id that a side does not report is censored at that side's smallest finite logprob of the position: the true one is
    no larger. A reported -inf says as little and is censored likewise. An id with a finite logprob on neither side
    (both -inf) has difference 0. Symmetric, 0 on identical input, always finite.

    Source: censoring as in "log-probability tracking" of LLM APIs (missing logprob := minimum of the reported top-k);
    L2 per position as in `published_topk`.

    Args:
        ids_a, lp_a, ids_b, lp_b: the two sides, see the module.
        mask: bool (T,), the positions that count; default all.

    Returns:
        float64 (T, 2), in nats: L2 and largest |difference| of each position (with a mask: of each selected one).

    Raises:
        ValueError: shapes do not fit, an id is negative or twice in a row, a logprob is NaN or +inf, or a position has
            no finite logprob on a side.
    """
    ids_a, lp_a, ids_b, lp_b = _checked(ids_a, lp_a, ids_b, lp_b, mask)
    a, b = lp_a.astype(np.float64), lp_b.astype(np.float64)
    floor_a, floor_b = _floor(a), _floor(b)
    at_b, in_b = _find(ids_a, ids_b)
    _, in_a = _find(ids_b, ids_a)
    # Side b's logprob of each id that a reports; -inf stands for "not known to be above the floor" from here on.
    b_of_a = np.where(in_b, np.take_along_axis(b, at_b, axis=1), -np.inf)
    reported_a = _censored_difference(a, floor_a, b_of_a, floor_b)
    only_b = np.where(in_a, 0.0, _censored_difference(b, floor_b, np.full_like(b, -np.inf), floor_a))
    differences = np.concatenate([reported_a, only_b], axis=1)
    # Sorted, so that the floating-point sum depends neither on the order of the ids nor on that of the sides.
    differences.sort(axis=1)
    return np.stack([np.sqrt((differences**2).sum(axis=1)), differences.max(axis=1)], axis=1)


def missing_ids(ids_a: Ids, ids_b: Ids, mask: Mask | None = None) -> int:
    """Number of top-k ids reported by one side only, over all positions (with a mask: over the selected ones).

    Raises:
        ValueError: as `union_topk`, for ids.
    """
    zeros_a, zeros_b = np.zeros(ids_a.shape, np.float32), np.zeros(ids_b.shape, np.float32)
    ids_a, _, ids_b, _ = _checked(ids_a, zeros_a, ids_b, zeros_b, mask)
    _, in_b = _find(ids_a, ids_b)
    return ids_a.size + ids_b.size - 2 * int(in_b.sum())


def summarise(per_position: NDArray[np.float64], missing: int) -> Distance:
    """One `Distance` from the rows of `union_topk`, float64 (T, 2), and the number of `missing_ids`.

    Raises:
        ValueError: no positions (a distance of 0 would claim that something was compared), or not (T, 2).
    """
    if per_position.ndim != 2 or per_position.shape[1] != 2:
        raise ValueError(f"per-position distances are (positions, 2), not {per_position.shape}")
    if len(per_position) == 0:
        raise ValueError("no positions to compare")
    # fsum rounds once, so the mean does not depend on the order of the positions.
    l2 = math.fsum(per_position[:, 0]) / len(per_position)
    return Distance(l2, float(per_position[:, 1].max()), len(per_position), missing)


def distance(ids_a: Ids, lp_a: Logprobs, ids_b: Ids, lp_b: Logprobs, mask: Mask | None = None) -> Distance:
    """The distance of two runs: `union_topk`, summarised.

    Raises:
        ValueError: as `union_topk`, or no position is left.
    """
    return summarise(union_topk(ids_a, lp_a, ids_b, lp_b, mask), missing_ids(ids_a, ids_b, mask))


def published_topk(ids_a: Ids, lp_a: Logprobs, ids_b: Ids, lp_b: Logprobs) -> float:
    """The published distance: mean over positions of the L2 over those of the first side's ids that both report.

    Source: Floating_point_noise_GPU_verification (Cankaya), revision 0c12bda.

    Known bias: an id that the second side does not report is dropped, which is where the sides differ most; so the
    value is too low (by a factor of 1.5 to 2.4 on published AWQ/GPTQ pairs), and where the top-k have different lengths
    or the censored tails differ it says nothing about them. Use it beside published figures only; `distance` otherwise.

    Returns:
        nats. A position with no common id is skipped, as is one whose L2 is not finite (-inf reported); `inf` when
        nothing is left to compare.

    Raises:
        ValueError: as `union_topk`.
    """
    ids_a, lp_a, ids_b, lp_b = _checked(ids_a, lp_a, ids_b, lp_b, None)
    at_b, common = _find(ids_a, ids_b)
    a, b = lp_a.astype(np.float64), np.take_along_axis(lp_b.astype(np.float64), at_b, axis=1)
    infinite = common & (np.isneginf(a) | np.isneginf(b))
    rows = np.flatnonzero(common.any(axis=1) & ~infinite.any(axis=1))
    if not rows.size:
        return math.inf
    # Dropped ids become 0 on both sides before the subtraction, so that a dropped -inf cannot make a NaN.
    kept = common[rows]
    squares = (np.where(kept, a[rows], 0.0) - np.where(kept, b[rows], 0.0)) ** 2
    squares.sort(axis=1)
    return math.fsum(np.sqrt(squares.sum(axis=1))) / len(rows)


def published_chosen(lp_a: Logprobs, lp_b: Logprobs) -> tuple[float, float]:
    """The published distance of two greedy runs of which only the generated tokens' logprobs are known.

    Source: Floating_point_noise_GPU_verification (Cankaya), revision 0c12bda. Known bias: steps are compared by number, also
    after the tokens have parted, so that it then tells contexts apart and not numerics.

    Args:
        lp_a, lp_b: float (steps,), logprob of each side's own token.

    Returns:
        nats: L2 over all steps (not a mean), and the largest |difference|.

    Raises:
        ValueError: not two vectors of the same length of at least one step, or a logprob that is not finite.
    """
    if lp_a.ndim != 1 or lp_a.shape != lp_b.shape or not lp_a.size:
        raise ValueError(f"chosen tokens' logprobs are two vectors of equal length, not {lp_a.shape} and {lp_b.shape}")
    if not (np.isfinite(lp_a).all() and np.isfinite(lp_b).all()):
        raise ValueError("a logprob is not finite")
    gaps = np.abs(lp_a.astype(np.float64) - lp_b.astype(np.float64))
    return math.sqrt(math.fsum(gaps**2)), float(gaps.max())


def decode_distance(
    tokens_a: Ids, ids_a: Ids, lp_a: Logprobs, tokens_b: Ids, ids_b: Ids, lp_b: Logprobs
) -> tuple[int, Distance, float]:
    """Distance of two greedy generations from one prompt, over the steps they have in common.

    A step is common as long as both sides have generated the same tokens before it. That includes the first step at
    which the chosen tokens part: its logits still have the same context.

    Args:
        tokens_a, tokens_b: chosen token ids, int32 (steps,).
        ids_a, lp_a, ids_b, lp_b: the top-k of each step, see the module.

    Returns:
        `(steps, distance, published)`: the number of common steps, the distance over them, and the published value:
        `inf` if the tokens part (or one side has more of them), otherwise `published_topk`.

    Raises:
        ValueError: as `union_topk`, chosen tokens and top-k have different numbers of steps, or there is no common step.
    """
    for tokens, ids in (tokens_a, ids_a), (tokens_b, ids_b):
        if tokens.ndim != 1 or len(tokens) != len(ids):
            raise ValueError(f"chosen tokens {tokens.shape} do not fit the top-k ids {ids.shape}")
    shorter = min(len(tokens_a), len(tokens_b))
    parted = np.flatnonzero(tokens_a[:shorter] != tokens_b[:shorter])
    steps = int(parted[0]) + 1 if parted.size else shorter
    common = distance(ids_a[:steps], lp_a[:steps], ids_b[:steps], lp_b[:steps])
    if parted.size or len(tokens_a) != len(tokens_b):
        return steps, common, math.inf
    return steps, common, published_topk(ids_a, lp_a, ids_b, lp_b)


def _checked(ids_a: Ids, lp_a: Logprobs, ids_b: Ids, lp_b: Logprobs, mask: Mask | None) -> tuple[Ids, Logprobs, Ids, Logprobs]:
    """The masked arrays, or a ValueError that says what is wrong with them."""
    for side, ids, logprobs in ("first", ids_a, lp_a), ("second", ids_b, lp_b):
        if ids.ndim != 2 or ids.shape != logprobs.shape or ids.shape[1] == 0:
            raise ValueError(f"{side} side: ids and logprobs are (positions, k), not {ids.shape} and {logprobs.shape}")
    if len(ids_a) != len(ids_b):
        raise ValueError(f"the sides have {len(ids_a)} and {len(ids_b)} positions")
    if mask is not None:
        if mask.dtype != np.bool_ or mask.shape != (len(ids_a),):
            raise ValueError(f"the mask is bool ({len(ids_a)},), not {mask.dtype} {mask.shape}")
        ids_a, lp_a, ids_b, lp_b = ids_a[mask], lp_a[mask], ids_b[mask], lp_b[mask]
    for side, ids, logprobs in ("first", ids_a, lp_a), ("second", ids_b, lp_b):
        if np.isnan(logprobs).any():
            raise ValueError(f"{side} side: a logprob is NaN")
        if np.isposinf(logprobs).any():
            raise ValueError(f"{side} side: a logprob is +inf")
        if not np.isfinite(logprobs).any(axis=1).all():
            raise ValueError(f"{side} side: a position has no finite logprob")
        if (ids < 0).any():
            raise ValueError(f"{side} side: a token id is negative")
        if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
            raise ValueError(f"{side} side: a token id is twice in a position")
    return ids_a, lp_a, ids_b, lp_b


def _floor(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smallest finite logprob of each position, (T, 1)."""
    floor: NDArray[np.float64] = np.where(np.isneginf(logprobs), np.inf, logprobs).min(axis=1, keepdims=True)
    return floor


def _find(wanted: Ids, rows: Ids) -> tuple[NDArray[np.intp], Mask]:
    """For each `wanted` (T, k) its column in the same row of `rows` (0 where there is none), and whether it is there."""
    if not len(wanted):
        return np.zeros(wanted.shape, np.intp), np.zeros(wanted.shape, np.bool_)
    order = np.argsort(rows, axis=1)
    # Row and id in one number: ascending over the whole array, so one binary search serves all rows.
    stride = int(max(wanted.max(), rows.max())) + 1
    base = np.arange(len(rows), dtype=np.int64)[:, None]
    keys = (base * stride + np.take_along_axis(rows, order, axis=1)).ravel()
    sought = base * stride + wanted
    found = np.minimum(np.searchsorted(keys, sought), keys.size - 1)
    present: Mask = keys[found] == sought
    return np.where(present, order.ravel()[found], 0), present


def _censored_difference(
    a: NDArray[np.float64], floor_a: NDArray[np.float64], b: NDArray[np.float64], floor_b: NDArray[np.float64]
) -> NDArray[Any]:
    """|a - b| with -inf raised to the floor of its side; 0 where both are -inf."""
    unknown_a, unknown_b = np.isneginf(a), np.isneginf(b)
    difference = np.abs(np.where(unknown_a, floor_a, a) - np.where(unknown_b, floor_b, b))
    return np.where(unknown_a & unknown_b, 0.0, difference)
