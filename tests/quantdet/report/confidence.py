"""How much a run's verdicts are worth together: were its controls caught, and what holds for all of its bounds at once."""

from typing import Any

from quantdet import stats

Case = dict[str, Any]


def controls(cases: list[Case]) -> dict[str, str]:
    """By hardware (and recorded vLLM version): how many BIT_EXACT verdicts count, and what was caught."""
    places: dict[str, list[Case]] = {}
    for case in cases:
        if case["test"] == "test_repeat" and case["verdict"] == "BIT_EXACT":
            p = case["properties"]
            places.setdefault(" ".join(filter(None, (p["case.hardware"], p.get("case.vllm", "")))), []).append(case)
    found = {}
    for place, group in places.items():
        texts = dict.fromkeys(case["properties"].get("control", "") for case in group)
        found[place] = f"{counted(group)}: {' | '.join(filter(None, texts))}"
    return found


def counted(cases: list[Case]) -> str:
    """For example `36 of 36 BIT_EXACT count`: those whose hardware's controls were caught."""
    exact = [case for case in cases if case["test"] == "test_repeat" and case["verdict"] == "BIT_EXACT"]
    caught = sum(case["properties"].get("controlled") == "yes" for case in exact)
    if exact and not caught:
        return f"UNCONTROLLED: none of {len(exact)} BIT_EXACT counts"
    return f"{caught} of {len(exact)} BIT_EXACT count"


def at_once(cases: list[Case], confidence: float = 0.95) -> str:
    """The bound on the flip rate per call that holds for every BIT_EXACT verdict of the run together; empty without any.

    Source: Bonferroni; each of m verdicts gets (1 - confidence) / m of the doubt.
    """
    runs = [
        int(case["properties"]["runs"])
        for case in cases
        if case["test"] == "test_repeat" and case["verdict"] == "BIT_EXACT" and case["properties"].get("runs")
    ]
    if not runs:
        return ""
    bound = stats.flip_rate_upper(0, min(runs), 1 - (1 - confidence) / len(runs))
    return f"all {len(runs)} BIT_EXACT at once: flip rate < {bound:.3g} per call at {confidence:.0%}"
