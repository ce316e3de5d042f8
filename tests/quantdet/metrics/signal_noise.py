"""Signal and noise of re-execution: is a claimed format still recognisable above the hardware difference?

Tokens that format i is claimed to have generated elsewhere are re-executed here, teacher-forced, by every verified format
j. `D[i, j, p]` is the distance between the recorded and the re-executed logprobs on prompt p: float64, nats, finite, not
negative, the mean over the prompt's content positions. One phase and one metric at a time. Rows are claimed, columns
verified, and `D[i, j]` is not `D[j, i]`: nothing here averages the two except `published_snr`, which repeats what was
published. Noise in the verifier's own kernel shows in one direction only, and an average hides it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdet.metrics.resampling import bootstrap_interval, minimum_detectable, sign_flip

Distances = NDArray[np.float64]


@dataclass(frozen=True)
class Snr:
    """Signal and noise, nats, and their ratio (`ratio`)."""

    signal: float
    noise: float
    snr: float | None


@dataclass(frozen=True)
class Comparison:
    """One claim, verified by another format j and by its own format i, on the same prompts.

    signal, noise: means over prompts of `D[i, j]` and `D[i, i]`, nats; snr: their ratio, as in `Snr`;
    difference: mean over prompts of `D[i, j, p] - D[i, i, p]`, nats; low, high: its 95 % bootstrap interval;
    mde: the mean difference that as many prompts with this SD show with 80 % power, nats;
    p: two-sided sign-flip p of the differences; smallest_p: what it could have been at best.
    """

    prompts: int
    signal: float
    noise: float
    snr: float | None
    difference: float
    low: float
    high: float
    mde: float
    p: float
    smallest_p: float


def published_snr(cross: tuple[float, float], own: tuple[float, float]) -> Snr:
    """Signal, noise and SNR of one pair of formats i and j, as published: means of both directions and of both diagonals.

    Source: Floating_point_noise_GPU_verification (Cankaya), revision 0c12bda. Known bias: the average of both directions hides
    a claim that another format matches better than its own. Use it beside published figures only; `directional` otherwise.

    Args:
        cross: D[i, j] and D[j, i], means over prompts, nats; `inf` where tokens part.
        own: D[i, i] and D[j, j].
    """
    signal, noise = sum(cross) / 2, sum(own) / 2
    return Snr(signal, noise, ratio(signal, noise))


def directional(d_ij: Distances, d_ii: Distances, seed: int, resamples: int = 2000) -> Comparison:
    """Compare how far another format and the claim's own format are from one claim, paired by prompt.

    Source of the ratio: S(i -> j) = D[i, j] / D[i, i] over the same claimed recording. A ratio says nothing where the own
    format is exact (D[i, i] = 0); difference, interval and p do.

    Args:
        d_ij, d_ii: float64 (P,), nats, the same prompts in the same order.
        seed: of the bootstrap, and of the sign flips beyond 20 prompts.
        resamples: of the bootstrap, see `resampling.bootstrap_interval`.

    Raises:
        ValueError: the shapes differ, there are no prompts, or a distance is negative or not finite.
    """
    check_distances(d_ij, 1)
    check_distances(d_ii, 1)
    if d_ij.shape != d_ii.shape:
        raise ValueError(f"distances are paired by prompt, not {d_ij.shape} and {d_ii.shape}")
    differences = d_ij.astype(np.float64) - d_ii
    low, high = bootstrap_interval(differences, seed, resamples)
    p, smallest = sign_flip(differences, seed)
    signal, noise = mean(d_ij), mean(d_ii)
    return Comparison(
        len(differences), signal, noise, ratio(signal, noise), mean(differences), low, high,
        minimum_detectable(differences), p, smallest,
    )  # fmt: skip


def energy(cross: float, within_claimed: float, within_verified: float) -> float:
    """Energy form 2 E|X - Y| - E|X - X'| - E|Y - Y'| of a cross distance, nats.

    Takes out what each side's own repeats differ by (a kernel with atomics is far from everything, itself included), so
    that two recipes that are the same up to repeat noise come out at 0. Not the hardware: that is part of `cross`.

    Args:
        cross: mean distance from claimed to re-executed runs.
        within_claimed, within_verified: mean distance of two different repeats on the claimed, on the verifying machine.

    Returns:
        at least 0 in expectation where the distance is of negative type (an L2 over the same ids is, one that drops ids is
        not); a sample may be below.
    """
    return 2 * cross - within_claimed - within_verified


def ratio(signal: float, noise: float) -> float | None:
    """`inf` where only the noise is 0; None where the two say nothing (0 over 0, inf over inf)."""
    if noise == 0:
        return math.inf if signal > 0 else None
    value = signal / noise
    return None if math.isnan(value) else value


def mean(values: Distances) -> float:
    """Mean of float64 (P,). Rounded once, so it does not depend on the order of the prompts."""
    return math.fsum(values) / len(values)


def check_distances(distances: Distances, axes: int) -> None:
    """Raise ValueError unless the array has so many axes, none empty, and every distance is finite and not negative."""
    if distances.ndim != axes or not distances.size:
        raise ValueError(f"distances have {axes} axes, none of them empty, not {distances.shape}")
    if not np.isfinite(distances).all() or (distances < 0).any():
        raise ValueError("a distance is negative or not finite")


def check_names(names: Sequence[str], expected: int) -> None:
    """Raise ValueError unless there are so many names, all different."""
    if len(names) != expected or len(set(names)) != expected:
        raise ValueError(f"{expected} different names expected, not {', '.join(names)}")
