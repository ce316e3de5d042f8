"""Suite properties of re-executions for the JUnit file."""

from collections.abc import Iterable, Sequence
from typing import Any

from quantdet.report.case import Case
from quantdet.report.reexecution import METRICS, PHASES, Verification, overall, ratios, verifications
from quantdet.report.text_layout import one_line


def properties(cases: Iterable[Case], order: Sequence[str] = ()) -> list[tuple[str, str]]:
    """`snr.decode`, `snr.prefill` and `identification`, one line of JSON each; none without re-executions."""
    found = verifications(cases, order)
    if not found:
        return []
    rows = [(f"snr.{phase}", one_line({one.where: _snr_figures(one, phase) for one in found})) for phase in PHASES]
    return [*rows, ("identification", one_line({one.where: _identified(one) for one in found}))]


def _snr_figures(one: Verification, phase: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in METRICS:
        found = ratios(one, phase, metric)
        figures[metric] = {
            "distances": {name: data["distances"].get(phase, {}).get(metric, {}) for name, data in one.claims.items()},
            "pairs": [vars(row) for row in found],
        }
        if found:
            names = ("signal", "noise", "snr", "mean_snr", "finite")
            figures[metric]["overall"] = dict(zip(names, overall(found), strict=True))
    return figures


def _identified(one: Verification) -> dict[str, Any]:
    keys = ("own", "prompts", "identified", "nearest", "comparisons")
    return {claimed: {key: data[key] for key in keys} for claimed, data in one.claims.items()}
