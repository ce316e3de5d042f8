"""Cases as reports read them, made by hand."""

from typing import Any

from quantdet.judging.verdicts import Pair, Verdict
from quantdet.report.case import Case

_FIGURES = ("model", "format", "hardware", "vllm", "engine", "phase")  # of every case; their names begin with `case.`


def case(test: str = "test_repeat", verdict: str = "BIT_EXACT", **more: Any) -> Case:
    """A case of the cell `m/f/h`, passed and expected unless `more` says otherwise.

    more: fields of `Case`, and figures: `model` to `phase`, and in `figures` by their names.
    """
    told = {"model": "m", "format": "f", "hardware": "h"} | {name: more.pop(name) for name in _FIGURES if name in more}
    figures = {f"case.{name}": value for name, value in told.items() if value} | more.pop("figures", {})
    cell = "/".join(told[name] for name in ("model", "format", "hardware"))
    given: dict[str, Any] = {
        "nodeid": f"{test}.py::{test}[{cell}]", "outcome": "passed", "where": cell, "why": "", "message": f"{verdict} {cell}",
        "expected": True,
    }  # fmt: skip
    return Case(test=test, verdict=Verdict(verdict), figures=figures, **(given | more))


def a_pair(a: str, b: str, verdict: str = "DISTINCT", **figures: Any) -> Pair:
    """A pair with every figure of formats that were not reported, unless `figures` says otherwise."""
    known: dict[str, Any] = {
        "l2": 1.0, "max_abs": 2.0, "differing": 12, "positions": 12, "decode_steps": 8, "decode_l2": 0.5,
        "decode_published": 0.25, "decode_published_back": 0.25, "within": 0.0, "prefill_published": 0.75,
        "prefill_published_back": 0.75,
    }  # fmt: skip
    return Pair(a, b, Verdict(verdict), **(known | figures))
