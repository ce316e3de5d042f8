"""How much a run's verdicts are worth together: were its controls caught, and what holds for all of its bounds at once."""

from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import OTHER_ENGINES
from quantdet.metrics import bounds
from quantdet.report.case import Case


def controls(cases: list[Case]) -> dict[str, str]:
    """How many BIT_EXACT count, and what was caught: by hardware, recorded vLLM version, and engine if it is not vLLM."""
    places: dict[str, list[Case]] = {}
    for case in cases:
        if _exact(case):
            other = case.engine if case.engine in OTHER_ENGINES else ""
            place = " ".join(filter(None, (case.hardware, case.vllm, other)))
            places.setdefault(place, []).append(case)
    found = {}
    for place, group in places.items():
        texts = dict.fromkeys(case.text("control") for case in group)
        found[place] = f"{counted(group)}: {' | '.join(filter(None, texts))}"
    return found


def _exact(case: Case) -> bool:
    return case.test == "test_repeat" and case.verdict is Verdict.BIT_EXACT


def counted(cases: list[Case]) -> str:
    """For example `36 of 36 BIT_EXACT count`: those whose hardware's controls were caught."""
    exact = list(filter(_exact, cases))
    caught = sum(case.controlled for case in exact)
    if exact and not caught:
        return f"UNCONTROLLED: none of {len(exact)} BIT_EXACT counts"
    return f"{caught} of {len(exact)} BIT_EXACT count" if exact else "no BIT_EXACT to count"


def at_once(cases: list[Case], confidence: float = 0.95) -> str:
    """The bound on the flip rate per call that holds for every BIT_EXACT verdict that counts, together; empty without any.

    Source: Bonferroni; each of m verdicts gets (1 - confidence) / m of the doubt.
    """
    runs = [case.runs for case in cases if _exact(case) and case.controlled and case.runs is not None]
    if not runs:
        return ""
    bound = bounds.flip_rate_upper(0, min(runs), 1 - (1 - confidence) / len(runs))
    return f"all {len(runs)} BIT_EXACT at once: flip rate < {bound:.3g} per call at {confidence:.0%}"


def multiplicity(cases: list[Case], alpha: float = 0.05) -> str:
    """What stays of the run's tests when all of them count: a case is one test, of the format against all others or of a claim.

    Source: Holm (1979) over the cases that rest on a p-value; that of a format against all others is the largest of its
    pairs (intersection-union, Berger 1982), and so is that of a claim against all formats with other numbers. Whatever is
    true, any false alarm among those that stay has at most probability `alpha`. Where bits decide there is no test: no
    difference, no alarm. A published question is no further test: its pairs are those of its formats' cases.
    """
    tests: list[tuple[float, bool]] = []
    for case in cases:
        if case.test == "test_question":
            continue
        pairs = [pair.p for pair in case.pairs if pair.p is not None]
        claim = case.reexecution or {}
        others = [one["p"] for name, one in claim.get("comparisons", {}).items() if name not in claim["own"]]
        if pairs:
            tests.append((max(pairs), case.verdict is not Verdict.INDISTINCT))
        elif others:
            tests.append((max(others), case.verdict is Verdict.DETECTABLE))
    if not tests:
        return ""
    adjusted = bounds.holm([value for value, _ in tests])
    claimed = [value for value, (_, said) in zip(adjusted, tests, strict=True) if said]
    stay = sum(value <= alpha for value in claimed)
    rest = "1 case rests" if len(tests) == 1 else f"{len(tests)} cases rest"
    found = f"{rest} on a p-value: of {len(claimed)} that found a difference {stay} stay"
    return f"{found} after Holm over the run (false-alarm rate among these at most {alpha:.0%})"
