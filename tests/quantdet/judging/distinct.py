"""Distinctness of a format: a pure judgement over its pairs with every other one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from quantdet.judging.differences import at
from quantdet.judging.pairs import pair
from quantdet.judging.reported import qualified
from quantdet.judging.same_numerics import Sameness, same_kernels, sameness
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

    Formats that are the same numerics (`same_numerics.sameness`) have to be IDENTICAL, all others DISTINCT, unless a row of the
    matrix declares a departure.

    `compare`: `pair`, or one that remembers what it has compared. `spreads`: by cell, how far its engine lifetimes are
    apart (nats); a format that is no farther from another than that is not told from it.
    """
    cell = own.cell
    if own.header.nonfinite:
        first = own.header.nonfinite[0]
        where = f"prompt {first.prompt} {first.phase} {at(first.phase, first.position)}"
        return Judgement(Verdict.INVALID, cell, "distinct", f"non-finite logits, first {where}", False)
    mute = [other.format_id for other, one in peers.items() if one.header.nonfinite]  # their own cases are INVALID
    known: dict[Cell, _Compared] = {}
    for other, observation in peers.items():
        if observation.header.nonfinite:
            continue
        if (why := comparable(own, observation)) is not None:
            text = f"cannot be compared with {other.format_id}: {why}"
            return Judgement(Verdict.INVALID, cell, "distinct", text, False, among=frozenset({str(cell), str(other)}))
        result = above_lifetimes(compare(own, observation), max(spreads.get(cell, 0.0), spreads.get(other, 0.0)))
        known[other] = _against(own, observation, other, result, expectations)
    if not known:
        text = f"nothing to compare with, non-finite logits in {', '.join(mute)}"
        return Judgement(Verdict.INVALID, cell, "distinct", text, False)
    units = {one.header.environment.get("gpu_uuid", "") for one in (own, *peers.values())}
    return _told(own, known, mute, len(units))


@dataclass(frozen=True)
class _Compared:
    """One peer: the pair, what is declared or derived of it, what is wrong with it, and whether its numbers are not known."""

    pair: Pair
    declared: str
    wrong: str
    unknown: bool


def _against(own: Observation, observation: Observation, other: Cell, result: Pair, expectations: Expectations) -> _Compared:
    """Whether a pair is what the matrix declares, or what follows from numbers and kernels."""
    cell = own.cell
    derived = _by_words(sameness(own, observation, expectations.unseen), expectations, own, observation, other)
    row = expectations.twins(cell, other)
    if row is not None and row.same_kernel and not same_kernels(own, observation, expectations.family):
        row = None
    if row is not None:
        declared = f"{row.outcome}: {other.format_id} ({row.reason})"
    elif derived.same is None:
        declared = f"distinct from or identical to {other.format_id} ({derived.why})"
    else:
        declared = f"identical to {other.format_id} ({derived.why})" if derived.same else ""
    expected, fine = _expected(row, derived)
    recompiled = [found for one in (cell, other) if (found := expectations.recompiles(one)) is not None]
    if recompiled or any(expectations.noise(one, "prefill") for one in (cell, other)):
        fine.add(Verdict.INDISTINCT)
    if derived.same and any(found.max_l2 is not None and result.l2 <= found.max_l2 for found in recompiled):
        fine.add(Verdict.DISTINCT)  # two processes, each with kernels of its own compilation
    wrong = ""
    if result.verdict not in fine:
        why = f"declared: {row.reason}" if row is not None else derived.why
        wrong = f"{result.verdict} {_preposition(result)} {other.format_id}, expected {expected} ({_size(result)}): {why}"
    return _Compared(result, declared, wrong, row is None and derived.same is None)


def _told(own: Observation, known: Mapping[Cell, _Compared], mute: Sequence[str], units: int) -> Judgement:
    """The judgement over all pairs: expected where each of them is."""
    pairs = tuple(one.pair for one in known.values())
    closest = min(pairs, key=lambda p: (p.verdict is Verdict.IDENTICAL, p.l2, p.b))
    twins, indistinct = ([p.b for p in pairs if p.verdict is word] for word in (Verdict.IDENTICAL, Verdict.INDISTINCT))
    verdict = Verdict.INDISTINCT if indistinct else Verdict.IDENTICAL if twins else Verdict.DISTINCT
    figures: dict[str, object] = {
        "expectation": "; ".join(one.declared for one in known.values() if one.declared) or "distinct",
        "pairs": len(pairs),
        "identical_to": twins,
        "closest": closest.b,
        "l2": closest.l2,
        "max_abs_diff": closest.max_abs,
        "logits.sha256": own.logits_sha256("prefill"),
        "compared_with": [p.b for p in pairs],
    }
    if wrong := [one.wrong for one in known.values() if one.wrong]:
        among = frozenset({str(own.cell), *(str(other) for other, one in known.items() if one.wrong)})
        rest = "\n".join(wrong[1:])
        return Judgement(verdict, own.cell, "distinct", wrong[0], False, figures, rest, pairs, among=among)
    text = f"DISTINCT from {len(pairs) - len(twins) - len(indistinct)} of {len(pairs)} formats"
    text += f" (not compared, non-finite logits: {', '.join(mute)})" if mute else ""
    text += f", IDENTICAL to {', '.join(twins)}" if twins else ""
    text += f", INDISTINCT from {', '.join(indistinct)}" if indistinct else ""
    text += f" (measured on {units} GPUs of one kind)" if units > 1 else ""
    text += f"; closest {closest.b} ({_size(closest)})"
    if unknown := [one.pair.b for one in known.values() if one.unknown]:
        text += f"; either verdict passes against {', '.join(unknown)}: the same kernels, and not known which numbers"
    return Judgement(verdict, own.cell, "distinct", text, True, figures, "", pairs)


def above_lifetimes(result: Pair, spread: float) -> Pair:
    """`result`, INDISTINCT where the formats are no farther apart than the engine lifetimes of one of them (`spread`, nats)."""
    if spread and result.verdict is Verdict.DISTINCT and result.l2 <= spread:
        return replace(
            result, verdict=Verdict.INDISTINCT, within=spread if result.within is None else max(result.within, spread)
        )
    return result


def _preposition(result: Pair) -> str:
    return "to" if result.verdict is Verdict.IDENTICAL else "from"


def _by_words(derived: Sameness, expectations: Expectations, own: Observation, peer: Observation, other: Cell) -> Sameness:
    """Where numbers are not known, two words of the matrix for them are other numbers; one word proves nothing.

    Words are those of what this suite has made: somebody else's checkpoint may hold other numbers than its row says.
    """
    one, word = (expectations.words.get(cell.format_id, "") for cell in (own.cell, other))
    made_here = all(observation.header.checkpoint_source.startswith(_MADE_HERE) for observation in (own, peer))
    if derived.same is None and not derived.made and made_here and one != word:
        return Sameness(False, f"other numbers by the matrix ({one} against {word}); {derived.why}")
    return derived


_MADE_HERE = ("synthetic ", "package ")  # as the checkpoint's source begins


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
