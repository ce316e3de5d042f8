"""Decode and prefill tokens per second of each format, and their ratio to an unquantized one: properties and table.

How they are measured: `quantdet.engines.child.speed`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantdet.matrix.matrix import Matrix
from quantdet.observations.header import Header
from quantdet.report.case import Case, Place
from quantdet.report.junit_text import rate, told_rate
from quantdet.report.text_layout import fitted, prose

NAMES = ("decode", "prefill")
NOTE = (
    "batch 1, one sequence, no logprobs, prefill by a call for one token, decode by what n more take; x: ratio to the "
    "baseline's. To set formats of one run side by side by, no serving benchmark"
)
_COUNTS = "n: rounds x decode steps"


def figures(header: Header, matrix: Matrix) -> dict[str, Any]:
    """`tokens_per_second.decode` and the like; none where an observation has no figures (older ones, refusals)."""
    timings = header.timings
    found: dict[str, Any] = {
        f"tokens_per_second.{name}": timings[key] for name in NAMES if (key := f"{name}_tokens_per_second") in timings
    }
    if not found:
        return {}
    names = ("rounds", "decode_steps", "prompt_tokens")
    found["tokens_per_second.n"] = {name: int(timings[key]) for name in names if (key := f"speed_{name}") in timings}
    found["tokens_per_second.baseline"] = baseline(header, matrix)
    return found


def baseline(header: Header, matrix: Matrix) -> str:
    """The format that a format's speed is set beside: of the model, the first unquantized eager one of its dtype.

    Where there is none of this dtype the first unquantized one, and where there is none at all the model's first format.
    """
    formats = [
        cell.format_id
        for cell in matrix.cells()
        if (cell.model_id, cell.hardware_id) == (header.model, header.hardware)
    ]  # fmt: skip
    kind = matrix.hardware[header.hardware].kind if header.hardware in matrix.hardware else "cpu"
    plain = [name for name in formats if not matrix.formats[name].quantized]
    rows = [name for name in plain if matrix.formats[name].mode == "eager"] or plain
    alike = [name for name in rows if matrix.formats[name].dtype_on(kind) == header.dtype]
    return next(iter(alike or rows or formats), "")


@dataclass(frozen=True)
class Pace:
    """A cell's figures, tokens per second; the ratios are to `baseline`'s of the same place. None where there is none.

    n: rounds, decode steps and prompt tokens, as far as they are known.
    """

    decode: float | None
    prefill: float | None
    decode_ratio: float | None
    prefill_ratio: float | None
    baseline: str
    n: Mapping[str, float]


def paces(cases: Iterable[Case]) -> dict[Place, dict[str, Pace]]:
    """Model and hardware -> format -> figures, of the formats that have some."""
    found: dict[Place, dict[str, Case]] = {}
    for case in cases:
        known = case.number("tokens_per_second.prefill") is not None
        if known and case.test not in ("test_versions", "test_reexecution"):
            found.setdefault(case.place, {}).setdefault(case.format, case)
    return {where: {name: _pace(case, cells) for name, case in cells.items()} for where, cells in found.items()}


def _pace(case: Case, cells: Mapping[str, Case]) -> Pace:
    name = case.text("tokens_per_second.baseline")
    decode, prefill = (case.number(f"tokens_per_second.{phase}") for phase in NAMES)
    ratios = [_ratio(case, cells.get(name), phase) for phase in NAMES]
    return Pace(decode, prefill, ratios[0], ratios[1], name, case.parts("tokens_per_second.n"))


def _ratio(one: Case, other: Case | None, phase: str) -> float | None:
    mine = one.number(f"tokens_per_second.{phase}")
    base = other.number(f"tokens_per_second.{phase}") if other is not None else None
    return told_rate(mine) / told_rate(base) if mine is not None and base is not None and told_rate(base) > 0 else None


def times(ratio: float | None) -> str:
    """A ratio to the baseline; empty if there is none."""
    return "" if ratio is None else f"{ratio:.2f}"


def sections(cases: Iterable[Case], width: int) -> list[str]:
    """A table per model and hardware, fastest decode first, after what the figures are; nothing without figures."""
    found = paces(cases)
    texts = [prose(f"tokens per second: {NOTE}; {_COUNTS}", width)] if found else []
    for where, formats in found.items():
        rows = []
        for name, pace in sorted(formats.items(), key=_slowness):
            n = f"{pace.n.get('rounds', '?')}x{pace.n.get('decode_steps', '?')}"
            figures_ = (rate(pace.decode), times(pace.decode_ratio), rate(pace.prefill), times(pace.prefill_ratio))
            rows.append((name, *figures_, n, pace.baseline))
        columns = ("format", ">decode", ">x", ">prefill", ">x", "n", "baseline")
        texts += [prose(f"{where}: tokens per second", width), fitted(columns, rows, width, fold=("format", "baseline"))]
    return texts


def _slowness(row: tuple[str, Pace]) -> float:
    return math.inf if row[1].decode is None else -told_rate(row[1].decode)
