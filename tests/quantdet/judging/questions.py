"""Questions of published experiments: one verdict, answered from the verdicts of several cells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from quantdet.judging import repeat
from quantdet.judging.distinct import above_lifetimes
from quantdet.judging.pairs import pair
from quantdet.judging.results import Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Judgement, Pair, Verdict
from quantdet.matrix.cell import PHASES, Cell
from quantdet.matrix.expectations import Expectations
from quantdet.matrix.selectors import Question
from quantdet.observations.comparable import comparable
from quantdet.observations.observation import Observation


@dataclass(frozen=True, order=True)
class Asked(Cell):
    """A question (`format_id` is its name) about one model on one hardware; `of` are the cells that answer it."""

    of: tuple[Cell, ...] = ()

    @property
    def id(self) -> str:
        return super().id

    def __str__(self) -> str:
        return self.id


def answer(
    case: Asked, question: Question, results: Mapping[Cell, Result], expectations: Callable[[Cell], Expectations],
    compare: Callable[[Observation, Observation], Pair] = pair, spreads: Mapping[Cell, float] = MappingProxyType({}),
) -> Judgement:  # fmt: skip
    """The verdict and the answer in one line.

    `apart`: DISTINCT if every two are, else the verdict of the first pair that is not. `repeatable`: BIT_EXACT if all are,
    else NOISY. Expected, where every repeat is as the matrix expects, and every pair of `apart` is distinct. INVALID where
    a format broke down, or its numbers cannot be judged. `compare`, `spreads`: see `quantdet.judging.distinct`.
    """
    measured = {cell: found.observations for cell, found in results.items() if isinstance(found, Measured)}
    known = {cell: _repeats(cell, found, expectations(cell)) for cell, found in measured.items()}
    told = {cell: found for cell, found in known.items() if found is not None}
    figures: dict[str, object] = {"asks": question.asks, "expectation": f"{question.answer}: {', '.join(question.formats)}"}
    broken = [f"{cell.format_id}: {why}" for cell, found in results.items() if (why := _broken(found))]
    broken += [f"{cell.format_id}: {one.words}" for cell, one in told.items() if one.verdict is Verdict.INVALID]
    if broken:
        return Judgement(Verdict.INVALID, case, "", broken[0], False, figures, "\n".join(broken[1:]))
    lacking = [cell.format_id for cell in case.of if cell not in told]
    if not told or (question.answer == "apart" and lacking):
        text = f"needs repeats of {', '.join(lacking)}, have none"
        return Judgement(Verdict.UNAVAILABLE, case, "", text, False, figures)
    wrong = [f"{cell.format_id} {one.words}" for cell, one in told.items() if not one.fine]
    if question.answer == "repeatable":
        words = {cell: one.verdict for cell, one in told.items()}
        groups = {
            word: _names([cell for cell in words if words[cell] == word], measured)
            for word in sorted(set(words.values()), reverse=True)  # NOISY before BIT_EXACT: what is the news
        }
        verdict = Verdict.BIT_EXACT if set(words.values()) == {Verdict.BIT_EXACT} else Verdict.NOISY
        parts = [f"{word}: {names}" for word, names in groups.items()]
        parts += [f"not judged: {', '.join(lacking)}"] if lacking else []
        figures |= {f"answer.{word}": names for word, names in groups.items()}
        return Judgement(verdict, case, "", "; ".join(parts), not wrong, figures, "\n".join(wrong))
    for a, b in combinations(told, 2):
        if obstacle := comparable(measured[a][0], measured[b][0]):
            text = f"{a.format_id} cannot be compared with {b.format_id}: {obstacle}"
            return Judgement(Verdict.INVALID, case, "", text, False, figures)
    pairs = tuple(
        above_lifetimes(compare(measured[a][0], measured[b][0]), max(spreads.get(a, 0.0), spreads.get(b, 0.0)))
        for a, b in combinations(told, 2)
    )
    other = next((found for found in pairs if found.verdict is not Verdict.DISTINCT), None)
    closest = min(pairs, key=lambda found: found.l2) if other is None else other
    verdict = closest.verdict
    apart = f"{closest.a} and {closest.b} {closest.l2:.3g} nats apart ({closest.differing}/{closest.positions} positions)"
    repeats = ", ".join(f"{cell.format_id} {one.words}" for cell, one in told.items())
    figures |= {"l2": closest.l2, "max_abs_diff": closest.max_abs, "closest": f"{closest.a},{closest.b}"}
    expected = other is None and not wrong
    return Judgement(verdict, case, "", f"{repeats}; {apart}", expected, figures, "\n".join(wrong), pairs)


@dataclass(frozen=True)
class _Repeats:
    """What a format's repeats say, in both phases; in words; and whether the matrix expects it."""

    verdict: Verdict
    words: str
    fine: bool


def _broken(result: Result) -> str:
    """What of a cell's result leaves no answer: it died, took too long, or was refused though nobody said so."""
    match result:
        case Missing(verdict=Verdict.ERROR | Verdict.TIMEOUT | Verdict.INVALID):
            return f"{result.verdict}: {result.first}"
        case Refusal():
            return f"refused: {result.first}"
    return ""


def _repeats(cell: Cell, found: tuple[Observation, ...], known: Expectations) -> _Repeats | None:
    """What the repeats of both phases say; None where there are no repeats to judge."""
    judged_phases = {phase: repeat.repeat(found, phase, known) for phase in PHASES}
    verdicts = {phase: one for phase, one in judged_phases.items() if one.verdict is not Verdict.UNAVAILABLE}
    if not verdicts:
        return None
    fine = True
    for phase, judged in verdicts.items():
        row = known.noise(cell, phase)
        declared = row is not None and row.outcome == "noisy" and judged.verdict is Verdict.NOISY and judged.declared
        fine = fine and (judged.expected or declared)
    noisy = [str(phase) for phase, judged in verdicts.items() if judged.verdict is Verdict.NOISY]
    if noisy:
        return _Repeats(Verdict.NOISY, f"NOISY in {' and '.join(noisy)}", fine)
    worst = next((judged.verdict for judged in verdicts.values() if judged.verdict is not Verdict.BIT_EXACT), Verdict.BIT_EXACT)
    runs = next(iter(verdicts.values())).figures.get("runs")
    return _Repeats(worst, f"{worst} (n = {runs})" if runs else str(worst), fine)


def _names(cells: list[Cell], measured: Mapping[Cell, tuple[Observation, ...]]) -> str:
    """Formats, with the kernel that ran; and the vLLM versions, where several are judged."""
    grouped: dict[str, list[str]] = {}
    for cell in cells:
        executed = measured[cell][0].header.executed
        layers = () if executed is None else executed.linear + executed.moe
        kernels = " + ".join(dict.fromkeys(layer.executed for layer in layers))
        grouped.setdefault(f"{cell.format_id} ({kernels})" if kernels else cell.format_id, []).append(cell.vllm)
    return ", ".join(name + (f" [vLLM {', '.join(versions)}]" if any(versions) else "") for name, versions in grouped.items())
