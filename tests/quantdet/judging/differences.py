"""Where repeats, or two observations, differ: pure functions over bits."""

from collections.abc import Callable, Sequence

import numpy as np

from quantdet.matrix.cell import Phase
from quantdet.matrix.expectations import Expect
from quantdet.metrics.bits import bits_equal, distinct, first_difference
from quantdet.metrics.distances import Distance, distance
from quantdet.observations.observation import Block, Observation, Output, PromptRecord


def runs_of(observation: Observation, phase: Phase) -> list[int]:
    """Group index per repeat: equal index, equal bits over all prompts."""
    outputs = []
    for index in range(observation.header.repeats):
        parts = []
        for prompt in observation.prompts:
            output = prompt.run(index)
            parts.append(output.block(phase).fingerprint)
            if phase == "decode":
                parts.append(output.output_ids.tobytes())
        outputs.append(b"".join(parts))
    return distinct(outputs)


def first_divergence(observations: Sequence[Observation], phase: Phase) -> tuple[str, str, float, float]:
    """First (prompt, position) in reading order at which any repeat differs from repeat 0, with what is known of it."""
    worst_abs, worst_l2 = 0.0, 0.0
    found: tuple[str, str] | None = None
    for observation in observations:
        for prompt in observation.prompts:
            base = prompt.run(0)
            candidates = []
            for index in range(1, observation.header.repeats):
                other = prompt.run(index)
                if other is base:
                    continue
                position = first_position(prompt, base, other, phase)
                if position is not None:
                    candidates.append((position, index))
                    gap = _gap(base.block(phase), other.block(phase))
                    worst_abs, worst_l2 = max(worst_abs, gap.max_abs), max(worst_l2, gap.l2)
            if candidates and found is None:
                position, index = min(candidates)
                found = (
                    f"prompt {prompt.header.id} {at(phase, position)} in repeat {index}",
                    _explain(observation, prompt.header.id, phase, position, index, base.block(phase)),
                )
            for seen in observation.header.divergences:
                if seen.phase == phase and seen.prompt == prompt.header.id:
                    worst_abs = max(worst_abs, seen.max_abs)
    assert found is not None
    return (*found, worst_abs, worst_l2)


def first_position(prompt: PromptRecord, a: Output, b: Output, phase: Phase) -> int | None:
    one, other = a.block(phase), b.block(phase)
    positions = [first_difference(one.digests, other.digests)]
    for x, y in ((one.chosen, other.chosen), (one.topk_ids, other.topk_ids), (one.topk_logprobs, other.topk_logprobs)):
        if not bits_equal(x, y):
            # Rows as raw bytes: compared as numbers, a NaN would differ from itself and -0.0 equal 0.0.
            rows = [np.ascontiguousarray(v).view(np.uint8).reshape(len(v), -1) for v in (x, y)]
            positions.append(int(np.flatnonzero((rows[0] != rows[1]).any(axis=1))[0]))
    positions = [p if p is None else int(prompt.rows(phase)[p]) for p in positions]
    if phase == "decode" and not bits_equal(a.output_ids, b.output_ids):
        positions.append(int(np.flatnonzero(a.output_ids != b.output_ids)[0]))
    return min((p for p in positions if p is not None), default=None)


def first_position_between(
    a: Observation, b: Observation, looked_at: Callable[[PromptRecord, Phase], bool] = lambda prompt, phase: True
) -> str:
    """Where repeat 0 of two observations of the same requests differs first, in reading order, prefill before decode."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for one, other in zip(a.prompts, b.prompts, strict=True):
        for phase in phases:
            if not looked_at(one, phase):
                continue
            position = first_position(one, one.run(0), other.run(0), phase)
            if position is not None:
                return f"prompt {one.header.id} {phase} {at(phase, position)}"
    return ""


def _gap(a: Block, b: Block) -> Distance:
    return distance(a.topk_ids, a.topk_logprobs, b.topk_ids, b.topk_logprobs)


def _explain(observation: Observation, prompt: str, phase: Phase, position: int, repeat_index: int, base: Block) -> str:
    if observation.reported:
        return ""
    margin = float(base.topk_logprobs[position, 0] - base.topk_logprobs[position, 1])
    for seen in observation.header.divergences:
        if (seen.prompt, seen.phase, seen.position, seen.repeat) == (prompt, phase, position, repeat_index):
            return (
                f" (token {seen.token}: {seen.ulp} ulp of {observation.header.executed.logits_dtype}, "  # type: ignore[union-attr]
                f"|d| {seen.max_abs:.3g}; {seen.differing} logits differ; top-1/top-2 margin {margin:.3g} nats)"
            )
    return f" (top-1/top-2 margin {margin:.3g} nats)"


def at(phase: Phase, position: int) -> str:
    return f"step {position}" if phase == "decode" else f"position {position}"


def has_to_be_exact(prompt: PromptRecord, phase: Phase, row: Expect | None) -> bool:
    """Whether the declared noise does not reach `prompt`.

    Decode is one row at a time; but its first step comes out of the prompt's pass, and the others read what that one wrote.
    """
    length = prompt.header.length
    if row is None or (row.min_rows is not None and length < row.min_rows):
        return True
    beyond_most = row.max_rows is not None and length > row.max_rows
    return beyond_most and (phase == "prefill" or (row.min_rows or 1) > 1)


def beyond(row: Expect | None) -> str:
    """The rows that declared noise is in, in words."""
    assert row is not None
    bounds = (f"up to {row.max_rows}" if row.max_rows else "", f"from {row.min_rows} on" if row.min_rows else "")
    return f"rows ({', '.join(filter(None, bounds))})"
