"""Which verified format is nearest to a claim? Distances as in `signal_noise`: rows claimed, columns verified, directional."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quantdet.metrics.bounds import rate_interval
from quantdet.metrics.signal_noise import Distances, check_distances, check_names, mean


@dataclass(frozen=True)
class Identification:
    """Which verified format is nearest to a claim.

    nearest: per prompt, every format at the smallest distance; counts: prompts on which a format alone is nearest;
    tied: prompts per set of formats that share the smallest distance, which are not separable there; overall: the format
    (formats, on a tie) of the smallest mean distance; own, mixed, other: prompts whose nearest formats all are, partly are,
    are not the claim's own; share: own / prompts, with interval, its exact two-sided 95 % bounds; both None where none of
    the claim's own formats is verified.
    """

    nearest: tuple[tuple[str, ...], ...]
    counts: dict[str, int]
    tied: dict[tuple[str, ...], int]
    overall: tuple[str, ...]
    own: int
    mixed: int
    other: int
    share: float | None
    interval: tuple[float, float] | None


def identify(distances: Distances, verified: Sequence[str], own: Collection[str]) -> Identification:
    """Which verified format is nearest to one claim, prompt by prompt and overall.

    Formats at exactly the same distance tie: their numerics are the same on that prompt, as far as the top-k shows, and
    the prompt does not separate them. It counts for the claim only if every one of them is its own.

    Args:
        distances: float64 (V, P), nats.
        verified: the names of the V formats, each once.
        own: formats that answer the claim: the claimed one and those expected to be identical to it; may be empty.

    Raises:
        ValueError: names and shape do not fit, `own` names a stranger, or a distance is negative or not finite.
    """
    check_distances(distances, 2)
    check_names(verified, len(distances))
    if strangers := sorted(set(own) - set(verified)):
        raise ValueError(f"not verified: {', '.join(strangers)}")
    smallest = distances == distances.min(axis=0)
    nearest = tuple(tuple(name for name, hit in zip(verified, column, strict=True) if hit) for column in smallest.T)
    means = [mean(row) for row in distances]
    alone = Counter(names[0] for names in nearest if len(names) == 1)
    ours = sum(set(names) <= set(own) for names in nearest)
    other = sum(set(names).isdisjoint(own) for names in nearest)
    return Identification(
        nearest,
        {name: alone[name] for name in verified},
        dict(Counter(names for names in nearest if len(names) > 1)),
        tuple(name for name, its in zip(verified, means, strict=True) if its == min(means)),
        ours, len(nearest) - ours - other, other,
        ours / len(nearest) if own else None,
        rate_interval(ours, len(nearest)) if own else None,
    )  # fmt: skip


def confusion(distances: Distances) -> Distances:
    """How often each claimed format is nearest to each verified one.

    A tied prompt is split into equal parts: formats that are expected to be identical tie on every prompt, and a column
    for ties would no longer say with whom.

    Args:
        distances: float64 (C, V, P), nats.

    Returns:
        float64 (C, V), prompts; rows sum to P; a fraction is the trace of a tie.

    Raises:
        ValueError: not (C, V, P), an axis is empty, or a distance is negative or not finite.
    """
    check_distances(distances, 3)
    smallest = distances == distances.min(axis=1, keepdims=True)
    shares: Distances = (smallest / smallest.sum(axis=1, keepdims=True)).sum(axis=2)
    return shares
