"""Evidence that is no more than somebody's reported logprobs: what can be asked of it, and how two formats compare.

A report has a few rows of the request, top-k logprobs or only the generated token's, and knows no full-vocabulary logits
and no executed kernel. So no verdict here claims more than that: equal rows are never IDENTICAL formats.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np

from quantdet.judging.verdicts import Judgement, Pair, Reference, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics.distances import Distance, Logprobs, published_chosen, published_topk, summarise, union_topk
from quantdet.observations.comparable import phase_in_common, rows_in_common
from quantdet.observations.observation import Observation, Output, PromptRecord
from quantdet.observations.published.layouts import INVESTIGATION

NOTE = "reported logprobs only, no full-vocabulary logits"
F = TypeVar("F", bound=Callable[..., Judgement])


def qualified(judge: F) -> F:
    """A judgement that says so where any observation among its arguments is no more than a report."""

    @wraps(judge)
    def said(*args: Any, **kwargs: Any) -> Judgement:
        found: Judgement = judge(*args, **kwargs)
        seen = [one for one in _observations((*args, *kwargs.values())) if one.reported]
        if not seen:
            return found
        once = [one.header.format for one in seen if one.header.repeats < 2]
        note = NOTE
        if once:
            runs = "one run each" if len(once) == len(seen) else f"one run of {', '.join(dict.fromkeys(once))}"
            note += f"; {runs}, repeat noise is not known"
        figures = {**found.figures, "evidence": "reported"}
        figures.pop("logits.sha256", None)
        return replace(found, why=f"{found.why}; {note}", figures=figures)

    return said  # type: ignore[return-value]


def _observations(values: Iterable[Any]) -> Iterable[Observation]:
    for value in values:
        if isinstance(value, Observation):
            yield value
        elif isinstance(value, Mapping):
            yield from _observations(value.values())
        elif isinstance(value, list | tuple):
            yield from _observations(value)


def cannot_repeat(observations: Sequence[Observation], phase: Phase) -> str | None:
    """Why repeats cannot be judged in `phase` (need and have); None if they can."""
    for one in observations:
        if one.reported and not any(prompt.rows(phase).size for prompt in one.prompts):
            return f"needs logprobs of {phase}, have none in what was reported"
        if one.reported and one.header.repeats < 2:
            return "needs two runs of a request, have one in what was reported"
    return None


def published(a: Observation, b: Observation, phase: Phase) -> float | None:
    """The published distance of two formats from `a` to `b`, in nats: mean over prompts, `inf` where decode's tokens part.

    Of top-k reports the distance of a prompt is `published_topk` over its rows, from the first `top_k` ids that `a`
    reports; of the generated tokens' logprobs alone it is `published_chosen`. None where some prompt has none, and no other
    one makes the mean `inf`.
    """
    return _over_prompts(published_per_prompt(a, b, phase))


def _over_prompts(found: Sequence[float | None]) -> float | None:
    if math.inf in found:
        return math.inf
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if len(known) == len(found) else None


def published_per_prompt(
    a: Observation, b: Observation, phase: Phase, *, same_tokens: bool = True
) -> list[float | None]:  # fmt: skip
    """`published`, prompt by prompt; None where no row of the phase was reported of both.

    `same_tokens` False: decode rows of parted tokens are compared by number all the same. The printed decode tables do so:
    they have `inf` where no row has an id in common, and a figure where some row happens to have one.
    """
    found: list[float | None] = []
    for one, other in zip(a.prompts, b.prompts, strict=True):
        x, y = one.run(0), other.run(0)
        if phase == "decode" and same_tokens and not _same_tokens(x, y):
            found.append(math.inf)
            continue
        _, at_x, at_y = np.intersect1d(one.rows(phase), other.rows(phase), assume_unique=True, return_indices=True)
        p, q = x.block(phase), y.block(phase)
        if not at_x.size:
            found.append(None)
            continue
        if tokens_alone(a) and tokens_alone(b):
            found.append(_chosen(p.chosen[at_x], q.chosen[at_y])[0])
            continue
        values = []
        for i, j in zip(at_x, at_y, strict=True):
            # Without the padding, which would count as an id that both report.
            left, right = np.isfinite(p.topk_logprobs[i]), np.isfinite(q.topk_logprobs[j])
            left[np.flatnonzero(left)[a.header.top_k :]] = False
            values.append(
                published_topk(
                    p.topk_ids[i][left][None], p.topk_logprobs[i][left][None],
                    q.topk_ids[j][right][None], q.topk_logprobs[j][right][None],
                )
            )  # fmt: skip
        finite = [value for value in values if math.isfinite(value)]
        found.append(math.fsum(finite) / len(finite) if finite else math.inf)
    return found


def tokens_alone(one: Observation) -> bool:
    """Whether the report is of the generated tokens' logprobs and of no other id: the investigation layout."""
    return one.reported and one.header.workload == INVESTIGATION


def _references(a: Observation, b: Observation) -> tuple[Reference, ...]:
    """The published metric of each prompt, there and back."""
    prefill, steps = (
        [published_per_prompt(x, y, phase, same_tokens=False) for x, y in ((a, b), (b, a))] for phase in reversed(PHASES)
    )
    apart = [not _same_tokens(one.run(0), other.run(0)) for one, other in zip(a.prompts, b.prompts, strict=True)]
    decode = [[math.inf if parted else value for parted, value in zip(apart, row, strict=True)] for row in steps]
    ids = [one.header.id for one in a.prompts]
    return tuple(Reference(*row) for row in zip(ids, *prefill, *decode, *steps, strict=True))


def _same_tokens(x: Output, y: Output) -> bool:
    return np.array_equal(x.output_ids, y.output_ids)


def _chosen(x: Logprobs, y: Logprobs) -> tuple[float | None, float | None]:
    """`published_chosen`; no figures where a token's logprob was not reported."""
    if len(x) != len(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None, None
    return published_chosen(x, y)


def _printed(a: Observation, b: Observation) -> tuple[float | None, float | None]:
    """What is printed of reports of one prompt's generated tokens: `published_chosen` over all steps of the first repeats."""
    if len(a.prompts) != 1 or not (tokens_alone(a) and tokens_alone(b)):
        return None, None
    return _chosen(*(one.prompts[0].run(0).decode.chosen for one in (a, b)))


def pair(a: Observation, b: Observation) -> Pair:
    """Two formats by the rows that were reported of both, with the same tokens before them.

    That is prefill where both have rows of it, else decode while the tokens are the same. The parting step has a common
    context and counts as a row; a distance is over the rows in which both report some same id, `inf` where there is none.
    DISTINCT: rows differ and, if a format is noisy, the smallest distance between them exceeds the largest within either, or
    the tokens of some prompt part between every two runs of the two formats and never between two runs of one.
    """
    phase = phase_in_common(a, b)
    assert phase is not None  # comparable() comes first
    differing = positions = steps = 0
    noisy = parted = False
    gaps: list[Distance] = []
    decode: list[Distance] = []
    cross: list[float] = []
    within: list[list[float]] = []  # by prompt, of each format that was repeated
    for one, other in zip(a.prompts, b.prompts, strict=True):
        x, y = one.run(0), other.run(0)
        at_x, at_y = rows_in_common(one, other, x, y, phase)
        positions += len(at_x)
        differing += int((x.block(phase).digests[at_x] != y.block(phase).digests[at_y]).any(axis=1).sum())
        gaps += _gap(one, other, x, y, phase)
        decode += _gap(one, other, x, y, "decode")
        steps += len(rows_in_common(one, other, x, y, "decode")[0])
        last = int(one.rows(phase)[at_x].max(initial=-1))
        variants = [_variants(record, phase) for record in (one, other)]
        noisy = noisy or max(map(len, variants)) > 1
        cross.append(min(_mean(_gap(one, other, i, j, phase)) for i, j in product(*variants)))
        if phase == "decode":
            tokens = [{output.output_ids.tobytes() for output in seen} for seen in variants]
            parted = parted or (len(tokens[0]) == len(tokens[1]) == 1 and tokens[0] != tokens[1])
        within.append(
            [
                max((_mean(_gap(record, record, i, j, phase, last)) for i, j in combinations(seen, 2)), default=0.0)
                for record, seen in zip((one, other), variants, strict=True)
                if len(record.header.runs) > 1
            ]
        )
    apart = float(np.mean([max(own, default=0.0) for own in within]))  # as far as it was seen
    distinct = parted or float(np.mean(cross)) > apart if noisy else differing > 0
    references = _references(a, b)
    published_ = {
        name: _over_prompts([getattr(one, name) for one in references])
        for name in ("prefill", "prefill_back", "decode", "decode_back")
    }
    chosen_l2, chosen_max = _printed(a, b)
    return Pair(
        a.header.format, b.header.format, Verdict.DISTINCT if distinct else Verdict.INDISTINCT,
        l2=_mean(gaps), max_abs=max((gap.max_abs for gap in gaps), default=math.inf), differing=differing, positions=positions,
        basis=phase, decode_steps=steps, decode_l2=_mean(decode) if steps else None,
        prefill_published=published_["prefill"], prefill_published_back=published_["prefill_back"],
        decode_published=published_["decode"], decode_published_back=published_["decode_back"],
        within=apart if all(len(own) == 2 for own in within) and math.isfinite(apart) else None,
        chosen_l2=chosen_l2, chosen_max=chosen_max, references=references,
    )  # fmt: skip


def _gap(one: PromptRecord, other: PromptRecord, x: Output, y: Output, phase: Phase, last: int | None = None) -> list[Distance]:
    """The distance over the common rows in which both sides report some same id; empty without one."""
    at_x, at_y = rows_in_common(one, other, x, y, phase, last)
    p, q = x.block(phase), y.block(phase)
    shared = [
        (i, j)
        for i, j in zip(at_x, at_y, strict=True)
        if np.intersect1d(p.topk_ids[i][np.isfinite(p.topk_logprobs[i])], q.topk_ids[j][np.isfinite(q.topk_logprobs[j])]).size
    ]
    if not shared:
        return []
    i, j = (np.array(side) for side in zip(*shared, strict=True))
    return [summarise(union_topk(p.topk_ids[i], p.topk_logprobs[i], q.topk_ids[j], q.topk_logprobs[j]), 0)]


def _mean(gaps: Sequence[Distance]) -> float:
    if not gaps:
        return math.inf
    return float(np.average([gap.l2 for gap in gaps], weights=[gap.positions for gap in gaps]))


def _variants(record: PromptRecord, phase: Phase) -> list[Output]:
    """One output per distinct set of tokens (decode) and bits of the phase."""
    seen: dict[bytes, Output] = {}
    for output in record.outputs:
        tokens = output.output_ids.tobytes() if phase == "decode" else b""
        seen.setdefault(tokens + output.block(phase).fingerprint, output)
    return list(seen.values())
