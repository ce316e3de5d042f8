"""Distinctness of a format: a pure judgement over its pairs with every other one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from quantdet.judging.differences import at
from quantdet.judging.numerics import Sameness, same_kernels, sameness
from quantdet.judging.pairs import pair
from quantdet.judging.reported import qualified
from quantdet.judging.verdicts import Judgement, Pair, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.comparable import comparable
from quantdet.observations.observation import Observation


@qualified
def distinctness(
    own: Observation,
    peers: Mapping[Cell, Observation],
    expectations: Expectations,
    compare: Callable[[Observation, Observation], Pair] = pair,
    spreads: Mapping[Cell, float] = MappingProxyType({}),
) -> Judgement:
    """Can this format be told from every other format of its model measured on this hardware?

    Formats that are the same numerics (`numerics.sameness`) have to be IDENTICAL, all others DISTINCT, unless a row of the
    matrix declares a departure.

    `compare`: `pair`, or one that remembers what it has compared. `spreads`: by cell, how far its engine lifetimes are
    apart (nats); a format that is no farther from another than that is not told from it.
    """
    cell = own.cell
    pairs: list[Pair] = []
    wrong: list[str] = []
    among = {str(cell)}
    mute: list[str] = []
    if own.header.nonfinite:
        first = own.header.nonfinite[0]
        where = f"prompt {first.prompt} {first.phase} {at(first.phase, first.position)}"
        return Judgement(Verdict.INVALID, f"INVALID {cell} distinct: non-finite logits, first {where}", False)
    twins: list[str] = []
    unknown: list[str] = []
    declared: list[str] = []
    for other, observation in peers.items():
        if observation.header.nonfinite:  # its own case is INVALID; there is nothing to compare with
            mute.append(other.format_id)
            continue
        why = comparable(own, observation)
        if why is not None:
            message = f"INVALID {cell} distinct: cannot be compared with {other.format_id}: {why}"
            return Judgement(Verdict.INVALID, message, False, among=frozenset({str(cell), str(other)}))
        result = above_lifetimes(compare(own, observation), max(spreads.get(cell, 0.0), spreads.get(other, 0.0)))
        derived = _by_words(sameness(own, observation, expectations.unseen), expectations, cell, other)
        row = expectations.twins(cell, other)
        if row is not None and row.same_kernel and not same_kernels(own, observation, expectations.family):
            row = None
        if row is not None:
            declared.append(f"{row.outcome}: {other.format_id} ({row.reason})")
        elif derived.same:
            declared.append(f"identical to {other.format_id} ({derived.why})")
        elif derived.same is None:
            declared.append(f"distinct from or identical to {other.format_id} ({derived.why})")
            unknown.append(other.format_id)
        if result.verdict is Verdict.IDENTICAL:
            twins.append(other.format_id)
        expected, fine = _expected(row, derived)
        recompiled = [found for one in (cell, other) if (found := expectations.recompiles(one)) is not None]
        if recompiled or any(expectations.noise(one, "prefill") for one in (cell, other)):
            fine.add(Verdict.INDISTINCT)
        if derived.same and any(found.max_l2 is not None and result.l2 <= found.max_l2 for found in recompiled):
            fine.add(Verdict.DISTINCT)  # two processes, each with kernels of its own compilation
        if result.verdict not in fine:
            among.add(str(other))
            why = f"declared: {row.reason}" if row is not None else derived.why
            wrong.append(
                f"{result.verdict} {_preposition(result)} {other.format_id}, expected {expected} ({_size(result)}): {why}"
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
        text, rest = f"{verdict} {cell} distinct: {wrong[0]}", "\n".join(wrong[1:])
        return Judgement(verdict, text, False, figures, rest, tuple(pairs), among=frozenset(among))
    text += f"; closest {closest.b} ({_size(closest)})"
    if unknown:
        text += f"; either verdict passes against {', '.join(unknown)}: the same kernels, and not known which numbers"
    return Judgement(verdict, f"{verdict} {cell} distinct: {text}", True, figures, "", tuple(pairs))


def above_lifetimes(result: Pair, spread: float) -> Pair:
    """`result`, INDISTINCT where the formats are no farther apart than the engine lifetimes of one of them (`spread`, nats)."""
    if spread and result.verdict is Verdict.DISTINCT and result.l2 <= spread:
        return replace(
            result, verdict=Verdict.INDISTINCT, within=spread if result.within is None else max(result.within, spread)
        )
    return result


def _preposition(result: Pair) -> str:
    return "to" if result.verdict is Verdict.IDENTICAL else "from"


def _by_words(derived: Sameness, expectations: Expectations, a: Cell, b: Cell) -> Sameness:
    """Where numbers are not known, two words of the matrix for them are other numbers; one word proves nothing."""
    one, other = (expectations.words.get(cell.format_id, "") for cell in (a, b))
    if derived.same is None and one != other:
        return Sameness(False, f"other numbers by the matrix ({one} against {other}); {derived.why}")
    return derived


def _expected(row: Expect | None, derived: Sameness) -> tuple[Verdict, set[Verdict]]:
    """What a pair has to be, and which verdicts pass: a declared departure comes before what was derived."""
    if row is not None and row.outcome == "may_be_identical_to":
        return Verdict.DISTINCT, {Verdict.DISTINCT, Verdict.IDENTICAL}
    if row is not None:
        expected = Verdict.IDENTICAL if row.outcome == "identical_to" else Verdict.DISTINCT
        return expected, {expected}
    if derived.same is None:
        return Verdict.DISTINCT, {Verdict.DISTINCT, Verdict.IDENTICAL}
    expected = Verdict.IDENTICAL if derived.same else Verdict.DISTINCT
    return expected, {expected}


def _size(result: Pair) -> str:
    text = f"L2 {result.l2:.3g} nats, {result.differing}/{result.positions} positions differ"
    if result.p is None:
        return text
    p = f"p = {result.p:.3g} by permuting repeats, smallest possible {result.p_smallest:.3g}"
    within = "not known" if result.within is None else f"{result.within:.3g}"
    return f"{text}; within {within}, {p}"
