"""Judgements over observations: pure functions, no engine, no I/O. Each states its verdict in one line."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from quantdet.judging.differences import at, beyond, first_divergence, has_to_be_exact, runs_of
from quantdet.judging.differences import first_position_between as first_position_between
from quantdet.judging.distinct import distinctness as distinctness
from quantdet.judging.reported import NOTE, cannot_repeat, qualified
from quantdet.judging.restart import restart as restart
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.expectations import Expectations, describe
from quantdet.matrix.rows import Cell, Phase
from quantdet.matrix.selectors import Expect
from quantdet.metrics import bounds
from quantdet.observations.observation import Observation


@qualified
def repeat(observations: Sequence[Observation], phase: Phase, expectations: Expectations) -> Judgement:
    """Did every repeat of every request give the same bits in `phase`, within each engine lifetime?

    Compared are the full-vocabulary logits (digests), every reported logprob and id, and for decode the tokens.
    """
    row = expectations.noise(observations[0].cell, phase)
    where = f"{observations[0].cell} {phase}"
    figures: dict[str, object] = {"expectation": describe(row, "bit-exact"), "phase": phase}
    if why := cannot_repeat(observations, phase):
        return Judgement(Verdict.UNAVAILABLE, f"UNAVAILABLE {where}: {why}", False, figures)
    for observation in observations:
        for bad in observation.header.nonfinite:
            if bad.phase == phase:
                message = f"INVALID {where}: non-finite logits, first prompt {bad.prompt} {at(phase, bad.position)}"
                return Judgement(Verdict.INVALID, f"{message} in repeat {bad.repeat}", False, figures)
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
        return Judgement(Verdict.BIT_EXACT, f"BIT_EXACT {where}: {text}", expected, figures, _hidden_noise(row))
    first, ulps, max_abs, l2 = first_divergence(observations, phase)
    figures |= {"first_divergence": first, "max_abs_diff": max_abs, "l2": l2}
    share = f"{flips} of {calls} repeats differ"
    if observations[0].reported and outputs == calls:  # as the published tables put it
        share = f"{calls} of {calls} repeats differ from each other"
    message = f"NOISY {where}: {share}, first {first}{ulps}"
    detail = f"{outputs} distinct outputs; flip rate < {bound:.3g} per call at 95 %"
    long = _noisy_beyond(observations, phase, row)
    if long:
        message = f"NOISY {where}: noise beyond the declared {beyond(row)}, in prompt {long}: {message}"
        return Judgement(Verdict.NOISY, message, False, figures, detail, declared=False)
    return Judgement(Verdict.NOISY, message, row is not None and row.outcome == "may_be_noisy", figures, detail)


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


def kernel(
    observation: Observation, requested: str, classes: Sequence[str], quantizes: str, moe_classes: Sequence[str] = (), *,
    precision: str = "", weight_only: Collection[str] = (), native: bool = False,
) -> Judgement:  # fmt: skip
    """Is the executed kernel the requested one, the same in every linear layer and in every layer of experts?

    `classes` are the class names that the requested kernel shows, `moe_classes` those of its experts; none: vLLM's own
    choice, not judged but for mixing. `quantizes`: "all" linear layers, "experts" alone, or none ("").
    `precision` ("W4A4") of a format that quantizes activations: a kernel of the `weight_only` classes does not. Where the
    chip multiplies the format (`native`), that is a substitution; elsewhere it is what vLLM can do, and is said.
    """
    header = observation.header
    executed = header.executed
    if executed is None:
        text = f"kernel: needs the layers of the loaded model to confirm {requested}, have {NOTE}"
        return Judgement(Verdict.UNAVAILABLE, f"UNAVAILABLE {observation.cell} {text}", False)
    expected = [" or ".join(names) for names in (classes, moe_classes) if names]
    figures: dict[str, object] = {
        "kernel.requested": requested,
        "kernel.executed": executed.summary,
        "expectation": f"{requested}: {', experts '.join(expected) or 'one kernel in every layer'}",
    }

    def invalid(why: str) -> Judgement:
        return Judgement(Verdict.INVALID, f"INVALID {observation.cell} kernel: {why}", False, figures, executed.summary)

    if executed.tensor_parallel_size != (ranks := int(header.engine_args.get("tensor_parallel_size", 1))):
        return invalid(f"requested {ranks} ranks, executed {executed.summary}")
    if not executed.linear:
        return invalid("no linear layer was found in the loaded model")
    if (moe_classes or quantizes == "experts") and not executed.moe:
        return invalid(f"requested {requested}, found no layer of experts in the loaded model: {executed.summary}")
    if quantizes == "experts" and any(layer.method.startswith("Unquantized") for layer in executed.moe):
        return invalid(f"requested {requested} for experts, executed {executed.summary}: the format was ignored")
    for layers, known in ((executed.linear, classes), (executed.moe, moe_classes)):
        names = {layer.executed for layer in layers}
        if len({(layer.executed, layer.detail) for layer in layers}) > 1:
            return invalid(f"mixed kernels: {executed.summary}")
        if known and not names <= set(known):
            return invalid(f"requested {requested} ({' or '.join(known)}), executed {executed.summary}")
        if quantizes == "all" and any(layer.method.startswith("Unquantized") for layer in layers):
            return invalid(f"requested {requested}, executed {executed.summary}: the format was ignored")
    asked = f"requested {requested}" if classes else "nothing requested: vLLM's own choice, the same in every layer"
    if precision:
        # Whatever the capitals: MarlinMxFp8 of one vLLM is MarlinMxfp8 of another.
        known_names = {name.casefold() for name in weight_only}
        names_found = [layer.executed for layer in executed.linear + executed.moe if layer.executed.casefold() in known_names]
        substituted, first = bool(names_found), next(iter(names_found), "")
        figures["kernel.weight_only"] = substituted
        if substituted and native:
            return invalid(f"{precision} requested, weight-only kernel {first} executed: activations are not quantized")
        if substituted:
            text = f"weight-only: executed {executed.summary}, activations stay {header.dtype or 'unquantized'}"
            message = f"CONFIRMED {observation.cell} kernel: {text} (the format is {precision}; {asked})"
            return Judgement(Verdict.CONFIRMED, message, True, figures)
    message = f"CONFIRMED {observation.cell} kernel: {executed.summary} ({asked})"
    return Judgement(Verdict.CONFIRMED, message, True, figures)


def refusal(cell: Cell, message: str | None, expectations: Expectations) -> Judgement:
    """The engine refused (`message`) or took (None) a cell; the matrix may have said that it would refuse."""
    row = expectations.unsupported(cell)
    figures: dict[str, object] = {"expectation": describe(row, "accepted")}
    if message is None:
        text = f"INVALID {cell}: the engine accepts a format that the matrix says is unsupported here"
        return Judgement(Verdict.INVALID, text, False, figures)
    if row is not None and row.match and not re.search(row.match, message):
        text = f"INVALID {cell}: refused for another reason than the declared one ({row.match!r}): {message[:200]}"
        return Judgement(Verdict.INVALID, text, False, figures)
    short = message if len(message) <= 300 else message[:297] + "..."
    return Judgement(
        Verdict.UNSUPPORTED, f"UNSUPPORTED {cell}: engine refused: {short}", row is not None, figures,
        "" if row is not None else "not declared: add an [[expect]] row with outcome = 'unsupported' if this is right",
    )  # fmt: skip
