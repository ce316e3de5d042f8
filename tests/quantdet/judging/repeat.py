"""Judgements over observations: pure functions, no engine, no I/O. Each states its verdict in one line."""

from collections import Counter
from collections.abc import Sequence

from quantdet.judging.differences import at, beyond, first_divergence, has_to_be_exact, runs_of
from quantdet.judging.reported import cannot_repeat, qualified
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Phase
from quantdet.matrix.expectations import Expect, Expectations, describe
from quantdet.metrics import bounds
from quantdet.observations.observation import Observation


@qualified
def repeat(observations: Sequence[Observation], phase: Phase, expectations: Expectations) -> Judgement:
    """Did every repeat of every request give the same bits in `phase`, within each engine lifetime?

    Compared are the full-vocabulary logits (digests), every reported logprob and id, and for decode the tokens.
    """
    row = expectations.noise(observations[0].cell, phase)
    cell = observations[0].cell
    figures: dict[str, object] = {"expectation": describe(row, "bit-exact"), "phase": phase}
    if why := cannot_repeat(observations, phase):
        return Judgement(Verdict.UNAVAILABLE, cell, phase, why, False, figures)
    for observation in observations:
        for bad in observation.header.nonfinite:
            if bad.phase == phase:
                why = f"non-finite logits, first prompt {bad.prompt} {at(phase, bad.position)} in repeat {bad.repeat}"
                return Judgement(Verdict.INVALID, cell, phase, why, False, figures)
    runs = [runs_of(observation, phase) for observation in observations]
    calls = sum(len(groups) for groups in runs)
    flips = sum(len(groups) - max(Counter(groups).values()) for groups in runs)
    bound = bounds.flip_rate_upper(flips, calls)
    outputs = max(max(groups) + 1 for groups in runs)
    figures |= {
        "runs": calls,
        "lifetimes": len(observations),
        "distinct_outputs": outputs,
        "flip_rate_upper95": round(bound, 6),
        "logits.sha256": observations[0].logits_sha256(phase),
    }
    if not flips:
        text = f"0 of {calls} repeats differ, flip rate < {bound:.3g} per call at 95 %"
        asked = observations[0].header.max_flip_rate
        if asked and bound > asked:
            text += f" (asked for {asked:g}: noise in the other phase ended the repeats)"
        figures |= {"first_divergence": "", "max_abs_diff": 0.0, "l2": 0.0}
        figures["flip_rate_upper95.lifetime"] = round(bounds.flip_rate_upper(0, len(observations)), 6)
        expected = row is None or row.outcome == "may_be_noisy"
        return Judgement(Verdict.BIT_EXACT, cell, phase, text, expected, figures, _hidden_noise(row))
    first, ulps, max_abs, l2 = first_divergence(observations, phase)
    figures |= {"first_divergence": first, "max_abs_diff": max_abs, "l2": l2}
    share = f"{flips} of {calls} repeats differ"
    if observations[0].reported and outputs == calls:  # as the published tables put it
        share = f"{calls} of {calls} repeats differ from each other"
    why = f"{share}, first {first}{ulps}"
    detail = f"{outputs} distinct outputs; flip rate < {bound:.3g} per call at 95 %"
    long = _noisy_beyond(observations, phase, row)
    if long:
        why = f"noise beyond the declared {beyond(row)}, in prompt {long}: NOISY {cell} {phase}: {why}"
        return Judgement(Verdict.NOISY, cell, phase, why, False, figures, detail, declared=False)
    return Judgement(Verdict.NOISY, cell, phase, why, row is not None and row.outcome == "may_be_noisy", figures, detail)


def _noisy_beyond(observations: Sequence[Observation], phase: Phase, row: Expect | None) -> str:
    """A prompt with more rows than the declared noise reaches, whose repeats differ all the same; else empty."""
    if row is None:
        return ""
    for observation in observations:
        for prompt in observation.prompts:
            bits = {output.block(phase).fingerprint for output in prompt.outputs}
            if len(bits) > 1 and has_to_be_exact(prompt, phase, row):
                return prompt.header.id
    return ""


def _hidden_noise(row: object) -> str:
    return "" if row is None else "the matrix says that this phase is noisy; no repeat differed"
