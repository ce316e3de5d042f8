"""Decode and prefill tokens per second of each format, and their ratio to an unquantized one: properties and table.

How they are measured: `quantdet.engines.child.speed`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from quantdet.matrix.matrix import Matrix
from quantdet.observations.header import Header
from quantdet.report.tables import Case, fitted, place, prose

NAMES = ("decode", "prefill")
NOTE = (
    "batch 1, one sequence, no logprobs, prefill by a call for one token, decode by what n more take; x: ratio to the "
    "baseline's. To set formats of one run side by side by, no serving benchmark"
)
_COUNTS = "n: rounds x decode steps"


def properties(header: Header, matrix: Matrix) -> dict[str, str]:
    """`tokens_per_second.decode` and the like; empty where an observation has no figures (older ones, refusals)."""
    timings = header.timings
    found = {
        f"tokens_per_second.{name}": f"{timings[key]:.{0 if timings[key] >= 1000 else 1}f}"
        for name in NAMES
        if (key := f"{name}_tokens_per_second") in timings
    }
    if not found:
        return {}
    counts = {
        name: timings[f"speed_{name}"] for name in ("rounds", "decode_steps", "prompt_tokens") if f"speed_{name}" in timings
    }
    found["tokens_per_second.n"] = " ".join(f"{name}={int(count)}" for name, count in counts.items())
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
    """A cell's figures, tokens per second, as texts; the ratios are to `baseline`'s of the same place, empty without it."""

    decode: str
    prefill: str
    decode_ratio: str
    prefill_ratio: str
    baseline: str
    n: str


def paces(cases: Iterable[Case]) -> dict[str, dict[str, Pace]]:
    """Model and hardware -> format -> figures, of the formats that have some."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for case in cases:
        p = case["properties"]
        if p.get("tokens_per_second.prefill") and case["test"] not in ("test_versions", "test_reexecution"):
            found.setdefault(place(p), {}).setdefault(p["case.format"], p)
    return {where: {name: _pace(p, cells) for name, p in cells.items()} for where, cells in found.items()}


def _pace(p: dict[str, str], cells: dict[str, dict[str, str]]) -> Pace:
    name = p.get("tokens_per_second.baseline", "")
    decode, prefill = (p.get(f"tokens_per_second.{phase}", "") for phase in NAMES)
    ratios = [_ratio(p, cells.get(name, {}), phase) for phase in NAMES]
    return Pace(decode, prefill, ratios[0], ratios[1], name, p.get("tokens_per_second.n", ""))


def _ratio(one: dict[str, str], other: dict[str, str], phase: str) -> str:
    mine, base = (p.get(f"tokens_per_second.{phase}") for p in (one, other))
    return f"{float(mine) / float(base):.2f}" if mine and base and float(base) > 0 else ""


def sections(cases: Iterable[Case], width: int) -> list[str]:
    """A table per model and hardware, fastest decode first, after what the figures are; nothing without figures."""
    found = paces(cases)
    texts = [prose(f"tokens per second: {NOTE}; {_COUNTS}", width)] if found else []
    for where, formats in found.items():
        rows = []
        for name, pace in sorted(formats.items(), key=lambda row: -float(row[1].decode or 0)):
            counts = dict(part.split("=") for part in pace.n.split())
            n = f"{counts.get('rounds', '?')}x{counts.get('decode_steps', '?')}"
            rows.append((name, pace.decode, pace.decode_ratio, pace.prefill, pace.prefill_ratio, n, pace.baseline))
        columns = ("format", ">decode", ">x", ">prefill", ">x", "n", "baseline")
        texts += [prose(f"{where}: tokens per second", width), fitted(columns, rows, width, fold=("format", "baseline"))]
    return texts
