"""Pairs of formats on the same forced token ids: identical, distinct, or not to be told apart from repeat noise."""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from quantdet.judging import reported
from quantdet.judging.verdicts import Pair, Verdict
from quantdet.matrix.cell import Phase
from quantdet.metrics import permutation
from quantdet.metrics.distances import Distance, decode_distance, distance, published_topk
from quantdet.observations.observation import Block, Observation, Output, PromptRecord, prefill_gaps

# A format is called DISTINCT when it is so from every other one, which needs no correction for their number
# (intersection-union test, Berger 1982); the report corrects over the run.
ALPHA = 0.05

_EVERY = slice(None)


def pair(a: Observation, b: Observation) -> Pair:
    """Two formats on the same forced ids (full-vocabulary digests decide; distances explain).

    Formats that are bit-exact in prefill are IDENTICAL if every logit is equal, prefill and, while the context is
    common, decode; one that is noisy in decode only has to have a repeat whose decode the other has too, and is
    INDISTINCT otherwise. Formats that are noisy in prefill are DISTINCT only if the smallest distance between them exceeds
    the largest within either of them, and an exact permutation test over their repeats gives at most `ALPHA`. Of reported
    evidence: `reported.pair`.
    """
    if a.reported:
        return reported.pair(a, b)
    single = all(len(_variants(o, p, "prefill")) == 1 for o in (a, b) for p in range(len(o.prompts)))
    seen = [_prompt_pair(one, other) for one, other in zip(a.prompts, b.prompts, strict=True)]
    within = 0.0 if single else max(a.prefill_spread, b.prefill_spread)
    p: float | None = None
    p_smallest: float | None = None
    if single:
        decode_single = all(len(_variants(o, p, "decode")) == 1 for o in (a, b) for p in range(len(o.prompts)))
        differs = any(one.differing for one in seen) or (decode_single and any(one.decode_differs for one in seen))
        verdict = Verdict.DISTINCT if differs else Verdict.IDENTICAL if _decode_meets(a, b) else Verdict.INDISTINCT
    else:
        cross = [prefill_gaps(one, other) for one, other in zip(a.prompts, b.prompts, strict=True)]
        p, p_smallest = found = _permuted(a, b, np.mean(cross, axis=0))
        apart = float(np.mean([gaps.min() for gaps in cross])) > within
        verdict = Verdict.DISTINCT if apart and found[0] <= ALPHA else Verdict.INDISTINCT

    def mean(gaps: list[Distance]) -> float:
        return float(np.average([gap.l2 for gap in gaps], weights=[gap.positions for gap in gaps]))

    return Pair(
        a.header.format, b.header.format, verdict, l2=mean([one.prefill for one in seen]),
        max_abs=max(one.prefill.max_abs for one in seen), differing=sum(one.differing for one in seen),
        positions=sum(one.positions for one in seen), decode_steps=sum(one.steps for one in seen),
        decode_l2=mean([one.decode for one in seen]),
        decode_published=float(np.mean([one.decode_published[0] for one in seen])),
        decode_published_back=float(np.mean([one.decode_published[1] for one in seen])),
        within=within if min(a.header.repeats, b.header.repeats) > 1 else None,
        prefill_published=float(np.mean([one.prefill_published[0] for one in seen])),
        prefill_published_back=float(np.mean([one.prefill_published[1] for one in seen])), p=p, p_smallest=p_smallest,
    )  # fmt: skip


@dataclass(frozen=True)
class _PromptPair:
    """One prompt of two formats, first repeats: what differs, and how far, in nats; published distances there and back."""

    differing: int
    positions: int
    steps: int
    decode_differs: int
    prefill: Distance
    decode: Distance
    prefill_published: tuple[float, float]
    decode_published: tuple[float, float]


def _prompt_pair(one: PromptRecord, other: PromptRecord) -> _PromptPair:
    x, y = one.run(0), other.run(0)
    content = np.arange(len(x.prefill.digests)) + 1 >= one.header.content_start
    common, gap, value = decode_distance(
        x.output_ids, x.decode.topk_ids, x.decode.topk_logprobs,
        y.output_ids, y.decode.topk_ids, y.decode.topk_logprobs,
    )  # fmt: skip
    parted = not np.array_equal(x.output_ids, y.output_ids)
    return _PromptPair(
        differing=int((x.prefill.digests != y.prefill.digests).any(axis=1).sum()),
        positions=len(x.prefill.digests),
        steps=common,
        decode_differs=int((x.decode.digests[:common] != y.decode.digests[:common]).any(axis=1).sum()),
        prefill=_forced(x, y, content),
        decode=gap,
        prefill_published=(_published(x.prefill, y.prefill, content), _published(y.prefill, x.prefill, content)),
        decode_published=(value, math.inf if parted else _published(y.decode, x.decode)),
    )


def _permuted(a: Observation, b: Observation, cross: NDArray[np.float64]) -> tuple[float, float]:
    """Exact permutation test over the first repeats of both; `cross` is (repeats of a, repeats of b), mean of prompts."""
    n, m = (min(o.header.repeats, permutation.MOST_REPEATS) for o in (a, b))
    between = cross[:n, :m]
    distances = np.block([[a.prefill_gaps[:n, :n], between], [between.T, b.prefill_gaps[:m, :m]]])
    return permutation.two_samples(distances, n), permutation.smallest(n, m)


def _forced(x: Output, y: Output, content: NDArray[np.bool_]) -> Distance:
    return distance(x.prefill.topk_ids, x.prefill.topk_logprobs, y.prefill.topk_ids, y.prefill.topk_logprobs, content)


def _published(x: Block, y: Block, positions: NDArray[np.bool_] | slice = _EVERY) -> float:
    return published_topk(x.topk_ids[positions], x.topk_logprobs[positions], y.topk_ids[positions], y.topk_logprobs[positions])


def _variants(observation: Observation, p: int, phase: Phase) -> list[Output]:
    """One output per distinct set of bits of the phase."""
    seen: dict[bytes, Output] = {}
    for output in observation.prompts[p].outputs:
        seen.setdefault(output.block(phase).fingerprint, output)
    return list(seen.values())


def _decode_meets(a: Observation, b: Observation) -> bool:
    """Whether, for every prompt, some repeat of `a` and some repeat of `b` have equal logits while the context is common."""
    for p in range(len(a.prompts)):
        met = False
        for x, y in product(_variants(a, p, "decode"), _variants(b, p, "decode")):
            apart = np.flatnonzero(x.output_ids != y.output_ids)
            common = int(apart[0]) + 1 if apart.size else len(x.output_ids)
            met = met or bool((x.decode.digests[:common] == y.decode.digests[:common]).all())
        if not met:
            return False
    return True
