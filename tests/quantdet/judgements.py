"""Judgements over observations: pure functions, no engine, no I/O. Each states its verdict in one line."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from quantdet import stats
from quantdet.compare import bits_equal, distinct, first_difference
from quantdet.distance import Distance, distance
from quantdet.expectations import Expectations, describe
from quantdet.observation import Block, Observation, Output, PromptRecord
from quantdet.pairs import comparable, pair
from quantdet.reported import NOTE, cannot_repeat, qualified
from quantdet.schema import PHASES, Cell, Expect, Phase
from quantdet.verdicts import Judgement, Pair, Verdict


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
                message = f"INVALID {where}: non-finite logits, first prompt {bad.prompt} {_at(phase, bad.position)}"
                return Judgement(Verdict.INVALID, f"{message} in repeat {bad.repeat}", False, figures)
    runs = [_runs(observation, phase) for observation in observations]
    calls = sum(len(groups) for groups in runs)
    flips = sum(len(groups) - max(Counter(groups).values()) for groups in runs)
    bound = stats.flip_rate_upper(flips, calls)
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
        figures |= {"first_divergence": "", "max_abs_diff": 0.0, "l2": 0.0}
        figures["flip_rate_upper95.lifetime"] = round(stats.flip_rate_upper(0, len(observations)), 6)
        expected = row is None or row.outcome == "may_be_noisy"
        return Judgement(Verdict.BIT_EXACT, f"BIT_EXACT {where}: {text}", expected, figures, _hidden_noise(row))
    first, ulps, max_abs, l2 = _first_divergence(observations, phase)
    figures |= {"first_divergence": first, "max_abs_diff": max_abs, "l2": l2}
    share = f"{flips} of {calls} repeats differ"
    if observations[0].reported and outputs == calls:  # as the published tables put it
        share = f"{calls} of {calls} repeats differ from each other"
    message = f"NOISY {where}: {share}, first {first}{ulps}"
    detail = f"{outputs} distinct outputs; flip rate < {bound:.3g} per call at 95 %"
    long = _noisy_beyond(observations, phase, row)
    if long:
        message = f"NOISY {where}: noise beyond the declared {row.max_rows} rows, in prompt {long}: {message}"  # type: ignore[union-attr]
        return Judgement(Verdict.NOISY, message, False, figures, detail, declared=False)
    return Judgement(Verdict.NOISY, message, row is not None and row.outcome == "may_be_noisy", figures, detail)


def _noisy_beyond(observations: Sequence[Observation], phase: Phase, row: Expect | None) -> str:
    """A prompt with more rows than the declared noise reaches, whose repeats differ all the same; else empty."""
    if row is None:
        return ""
    for observation in observations:
        for prompt in observation.prompts:
            bits = {output.block(phase).fingerprint for output in prompt.outputs}
            if len(bits) > 1 and _has_to_be_exact(prompt, phase, row):
                return prompt.header.id
    return ""


def _hidden_noise(row: object) -> str:
    return "" if row is None else "the matrix says that this phase is noisy; no repeat differed"


def _runs(observation: Observation, phase: Phase) -> list[int]:
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


def _first_divergence(observations: Sequence[Observation], phase: Phase) -> tuple[str, str, float, float]:
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
                position = _first_position(prompt, base, other, phase)
                if position is not None:
                    candidates.append((position, index))
                    gap = _gap(base.block(phase), other.block(phase))
                    worst_abs, worst_l2 = max(worst_abs, gap.max_abs), max(worst_l2, gap.l2)
            if candidates and found is None:
                position, index = min(candidates)
                found = (
                    f"prompt {prompt.header.id} {_at(phase, position)} in repeat {index}",
                    _explain(observation, prompt.header.id, phase, position, index, base.block(phase)),
                )
            for seen in observation.header.divergences:
                if seen.phase == phase and seen.prompt == prompt.header.id:
                    worst_abs = max(worst_abs, seen.max_abs)
    assert found is not None
    return (*found, worst_abs, worst_l2)


def _first_position(prompt: PromptRecord, a: Output, b: Output, phase: Phase) -> int | None:
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
            position = _first_position(one, one.run(0), other.run(0), phase)
            if position is not None:
                return f"prompt {one.header.id} {phase} {_at(phase, position)}"
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


def _at(phase: Phase, position: int) -> str:
    return f"step {position}" if phase == "decode" else f"position {position}"


def kernel(
    observation: Observation, requested: str, classes: Sequence[str], quantized: bool, moe_classes: Sequence[str] = (), *,
    precision: str = "", weight_only: Collection[str] = (), native: bool = False,
) -> Judgement:  # fmt: skip
    """Is the executed kernel the requested one, the same in every linear layer and in every layer of experts?

    `classes` are the class names that the requested kernel shows, `moe_classes` those of its experts; none: vLLM's own
    choice, not judged but for mixing.
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

    if not executed.linear:
        return invalid("no linear layer was found in the loaded model")
    if moe_classes and not executed.moe:
        return invalid(f"requested {requested}, found no layer of experts in the loaded model: {executed.summary}")
    for layers, known in ((executed.linear, classes), (executed.moe, moe_classes)):
        names = {layer.executed for layer in layers}
        if len({(layer.executed, layer.detail) for layer in layers}) > 1:
            return invalid(f"mixed kernels: {executed.summary}")
        if known and not names <= set(known):
            return invalid(f"requested {requested} ({' or '.join(known)}), executed {executed.summary}")
        if quantized and any(layer.method.startswith("Unquantized") for layer in layers):
            return invalid(f"requested {requested}, executed {executed.summary}: the format was ignored")
    asked = f"requested {requested}" if classes else "nothing requested: vLLM's own choice, the same in every layer"
    if precision:
        # Whatever the capitals: MarlinMxFp8 of one vLLM is MarlinMxfp8 of another.
        first = executed.linear[0].executed
        substituted = first.casefold() in {name.casefold() for name in weight_only}
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


@qualified
def distinctness(
    own: Observation,
    peers: Mapping[Cell, Observation],
    expectations: Expectations,
    compare: Callable[[Observation, Observation], Pair] = pair,
) -> Judgement:
    """Can this format be told from every other format of its model measured on this hardware?

    `compare`: `pair`, or one that remembers what it has compared.
    """
    cell = own.cell
    pairs: list[Pair] = []
    wrong: list[str] = []
    mute: list[str] = []
    if own.header.nonfinite:
        first = own.header.nonfinite[0]
        where = f"prompt {first.prompt} {first.phase} {_at(first.phase, first.position)}"
        return Judgement(Verdict.INVALID, f"INVALID {cell} distinct: non-finite logits, first {where}", False)
    twins: list[str] = []
    declared: list[str] = []
    for other, observation in peers.items():
        if observation.header.nonfinite:  # its own case is INVALID; there is nothing to compare with
            mute.append(other.format_id)
            continue
        why = comparable(own, observation)
        if why is not None:
            message = f"INVALID {cell} distinct: cannot be compared with {other.format_id}: {why}"
            return Judgement(Verdict.INVALID, message, False)
        result = compare(own, observation)
        row = expectations.twins(cell, other)
        if row is not None and row.same_kernel and not _same_kernel(own, observation):
            row = None
        if row is not None:
            declared.append(f"{row.outcome}: {other.format_id} ({row.reason})")
        if result.verdict is Verdict.IDENTICAL:
            twins.append(other.format_id)
        expected = Verdict.DISTINCT if row is None or row.outcome != "identical_to" else Verdict.IDENTICAL
        fine = {expected}
        if row is not None and row.outcome == "may_be_identical_to":
            fine.add(Verdict.IDENTICAL)
        if any(expectations.noise(one, "prefill") for one in (cell, other)):
            fine.add(Verdict.INDISTINCT)
        if result.verdict not in fine:
            hint = "" if row is not None or result.verdict is not Verdict.IDENTICAL else _same(own, observation)
            wrong.append(
                f"{result.verdict} {_preposition(result)} {other.format_id}, expected {expected} ({_size(result)}){hint}"
            )
        pairs.append(result)
    if not pairs:
        text = f"INVALID {cell} distinct: nothing to compare with, non-finite logits in {', '.join(mute)}"
        return Judgement(Verdict.INVALID, text, False)
    closest = min(pairs, key=lambda p: (p.verdict is Verdict.IDENTICAL, p.l2, p.b))
    indistinct = [p.b for p in pairs if p.verdict is Verdict.INDISTINCT]
    verdict = Verdict.INDISTINCT if indistinct else Verdict.IDENTICAL if twins else Verdict.DISTINCT
    figures: dict[str, object] = {
        "expectation": "; ".join(declared) if declared else "distinct",
        "pairs": len(pairs),
        "identical_to": ",".join(twins),
        "closest": closest.b,
        "l2": closest.l2,
        "max_abs_diff": closest.max_abs,
        "logits.sha256": own.logits_sha256("prefill"),
    }
    told = len(pairs) - len(twins) - len(indistinct)
    text = f"DISTINCT from {told} of {len(pairs)} formats"
    if mute:
        text += f" (not compared, non-finite logits: {', '.join(mute)})"
    if twins:
        text += f", IDENTICAL to {', '.join(twins)}"
    if indistinct:
        text += f", INDISTINCT from {', '.join(indistinct)}"
    units = {one.header.environment.get("gpu_uuid", "") for one in (own, *peers.values())}
    if len(units) > 1:
        text += f" (measured on {len(units)} GPUs of one kind)"
    figures["compared_with"] = ",".join(p.b for p in pairs)
    if wrong:
        return Judgement(verdict, f"{verdict} {cell} distinct: {wrong[0]}", False, figures, "\n".join(wrong[1:]), tuple(pairs))
    text += f"; closest {closest.b} ({_size(closest)})"
    return Judgement(verdict, f"{verdict} {cell} distinct: {text}", True, figures, "", tuple(pairs))


def _preposition(result: Pair) -> str:
    return "to" if result.verdict is Verdict.IDENTICAL else "from"


def _same_kernel(a: Observation, b: Observation) -> bool:
    one, other = a.header.executed, b.header.executed
    return one is not None and other is not None and one.summary == other.summary


def _same(a: Observation, b: Observation) -> str:
    """A hint for twins that nobody declared."""
    one, other = a.header.executed, b.header.executed
    if one is None or other is None or one.linear != other.linear:
        return ""
    return f"; both ran {one.summary}: if they hold the same numbers, declare [[expect]] outcome = 'identical_to'"


def _size(result: Pair) -> str:
    text = f"L2 {result.l2:.3g} nats, {result.differing}/{result.positions} positions differ"
    if result.p is None:
        return text
    p = f"p = {result.p:.3g} by permuting repeats, smallest possible {result.p_smallest:.3g}"
    return f"{text}; within {result.within:.3g}, {p}"


@qualified
def restart(observations: Sequence[Observation], expectations: Expectations) -> Judgement:
    """Do separate engine lifetimes give the same bits? Compared is repeat 0 of each, both phases.

    Declared noise excuses a difference in its own phase only, and in prefill up to its rows; `may_recompile` any.
    """
    cell = observations[0].cell
    if any(observation.header.nonfinite for observation in observations):
        return Judgement(Verdict.INVALID, f"INVALID {cell} restart: non-finite logits", False)
    if len(observations) < 2:
        return Judgement(Verdict.INVALID, f"INVALID {cell} restart: needs 2 lifetimes, have {len(observations)}", False)
    seen = distinct([(o.logits_sha256("decode") + o.logits_sha256("prefill")).encode() for o in observations])
    noise: dict[Phase, Expect | None] = {phase: expectations.noise(cell, phase) for phase in PHASES}
    recompiles = expectations.recompiles(cell)
    wrong: list[Phase] = []
    for phase, row in noise.items():
        if recompiles is None and max(distinct([_exact_rows(o, phase, row) for o in observations])):
            wrong.append(phase)
    flips = len(seen) - max(Counter(seen).values())
    bound = stats.flip_rate_upper(flips, len(seen))
    rows = dict.fromkeys(describe(row, "") for row in (*noise.values(), recompiles) if row is not None)
    figures: dict[str, object] = {
        "expectation": "; ".join(rows) or "bit-exact across lifetimes",
        "distinct_outputs": max(seen) + 1,
        "flip_rate_upper95": round(bound, 6),
    }
    share = f"{flips} of {len(seen)} lifetimes differ, flip rate < {bound:.3g} per lifetime at 95 %"
    figures["caches"] = ",".join(o.header.caches for o in observations)
    if any(o.header.caches == "cold" for o in observations):
        share += "; the last one with cold caches"
    if flips:

        def named(prompt: PromptRecord, phase: Phase) -> bool:  # what no row excuses, if there is any
            return not wrong or (phase in wrong and _has_to_be_exact(prompt, phase, noise[phase]))

        places = ((o, first_position_between(observations[0], o, named)) for o in observations[1:])
        other, where = next((o, place) for o, place in places if place)
        figures["first_divergence"] = where
        share += f"; lifetime {other.header.lifetime} differs from the first at {where}"
    verdict = Verdict.NOISY if flips else Verdict.BIT_EXACT
    return Judgement(verdict, f"{verdict} {cell} restart: {share}", not wrong, figures)


def _exact_rows(observation: Observation, phase: Phase, row: Expect | None) -> bytes:
    """Digests of repeat 0 of every prompt that the declared noise leaves to be exact."""
    exact = (prompt for prompt in observation.prompts if _has_to_be_exact(prompt, phase, row))
    return b"".join(prompt.run(0).block(phase).digests.tobytes() for prompt in exact)


def _has_to_be_exact(prompt: PromptRecord, phase: Phase, row: Expect | None) -> bool:
    """Whether the declared noise does not reach `prompt`; decode is one row at a time."""
    return row is None or (phase == "prefill" and row.max_rows is not None and prompt.header.length > row.max_rows)
