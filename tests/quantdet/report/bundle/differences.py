"""Where the observations of one cell differ, for a bug bundle: pure functions."""

from collections.abc import Sequence
from typing import Any

from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics.bits import first_difference
from quantdet.observations.observation import Observation, Output, PromptRecord


def where(observations: Sequence[Observation]) -> tuple[str | None, int]:
    """The first prompt whose repeats differ, and the engine lifetimes it takes to see that: 1, or 2 where each is exact."""
    for number, record in enumerate(observations[0].prompts):
        if any(len(one.prompts[number].outputs) > 1 for one in observations):
            return record.header.id, 1
    for number, record in enumerate(observations[0].prompts):
        if len({one.prompts[number].run(0).fingerprint for one in observations}) > 1:
            return record.header.id, 2
    return None, 1


def involved(observations: Sequence[Observation], lifetimes: int) -> tuple[Observation, ...]:
    """The observations that show it: the first lifetime with noise, or two that differ from each other; else the first."""
    if lifetimes > 1:
        first = observations[0]
        others = [one for one in observations[1:] if _bits(one) != _bits(first)]
        return (first, *others[:1])
    noisy = [one for one in observations if any(len(prompt.outputs) > 1 for prompt in one.prompts)]
    bad = [one for one in observations if one.header.nonfinite]
    return tuple((noisy or bad or list(observations))[:1])


def nonfinite(observations: Sequence[Observation]) -> str | None:
    """The first prompt with logits that are not finite."""
    return next((bad.prompt for one in observations for bad in one.header.nonfinite), None)


def found(observations: Sequence[Observation], lifetimes: int) -> list[dict[str, Any]]:
    """Each prompt and phase that differs: the first position, and what is known of it.

    Positions of decode are steps. ULP distance, largest difference and number of unequal logits are known within one
    lifetime; the top-1/top-2 margin (nats) is that of the run that is compared with.
    """
    rows: list[dict[str, Any]] = []
    if lifetimes > 1 and len(observations) > 1:
        one, other = observations[:2]
        for number, prompt in enumerate(one.prompts):
            for phase in PHASES:
                row = _differ(prompt, prompt.run(0), other.prompts[number].run(0), phase)
                if row is not None:
                    rows.append({**row, "lifetime": other.header.lifetime, "repeat": 0})
        return rows
    for observation in observations:
        for prompt in observation.prompts:
            for phase in PHASES:
                base = prompt.run(0)
                first = [
                    (row["position"], repeat, row)
                    for repeat in range(1, observation.header.repeats)
                    if (row := _differ(prompt, base, prompt.run(repeat), phase)) is not None
                ]
                if first:
                    position, repeat, row = min(first, key=lambda entry: entry[:2])
                    rows.append({**row, "repeat": repeat, **_known(observation, prompt.header.id, phase, position, repeat)})
    return rows


def _differ(prompt: PromptRecord, base: Output, other: Output, phase: Phase) -> dict[str, Any] | None:
    a, b = base.block(phase), other.block(phase)
    if other is base or a.fingerprint == b.fingerprint:
        return None
    index = first_difference(a.digests, b.digests)
    if index is None:  # the same logits, other logprobs
        index = next(i for i in range(len(a.chosen)) if _row(a, i) != _row(b, i))
    row = {"prompt": prompt.header.id, "phase": phase, "position": int(prompt.rows(phase)[index])}
    width = min(2, a.topk_logprobs.shape[1])
    margin = float(a.topk_logprobs[index, 0] - a.topk_logprobs[index, 1]) if width == 2 else None
    return {**row, "margin_nats": margin}


def _row(block: Any, index: int) -> bytes:
    return b"".join(array[index].tobytes() for array in (block.chosen, block.topk_ids, block.topk_logprobs))


def _known(observation: Observation, prompt: str, phase: Phase, position: int, repeat: int) -> dict[str, Any]:
    for seen in observation.header.divergences:
        if (seen.prompt, seen.phase, seen.position, seen.repeat) == (prompt, phase, position, repeat):
            executed = observation.header.executed
            return {
                "token": seen.token, "ulp": seen.ulp, "dtype": executed.logits_dtype if executed is not None else "",
                "max_abs": seen.max_abs, "differing_logits": seen.differing,
            }  # fmt: skip
    return {}


def _bits(observation: Observation) -> str:
    return observation.logits_sha256("decode") + observation.logits_sha256("prefill")
