"""Why an engine gave nothing to judge: in one line, with the engine's own words, and what its log ends with.

A process that ended without a word, or that only says "see above", has said why in its log: that is looked for there.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from quantdet.judging import refusal
from quantdet.judging.differences import at
from quantdet.judging.results import Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Cause, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from quantdet.untrusted import plain

# What engines say that is no reason but points at one.
_POINTS_ELSEWHERE = re.compile(
    r"no completion record|root cause|stack trace (?:above|for)|see the (?:log|trace)", re.IGNORECASE
)
# What a log calls its reason: an exception of Python or C++, a fatal error of the interpreter, a failed assertion, the loader.
_REASONS = re.compile(
    r"(?:(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt): \S.*"
    r"|what\(\):\s+\S.*|(?:CUDA|HIP|NCCL|cuBLAS|cuDNN) (?:driver )?error\b.*|Fatal Python error: .*|.*: Assertion .* failed.*"
    r"|.*(?:symbol lookup error|error while loading shared libraries|undefined symbol): .*)"
)
_MOST = 1 << 16
_LONGEST = 400


def of(cell: Cell, result: Result, expectations: Expectations) -> Cause | None:
    """Why nothing can be judged of `cell`; None if something can, or if it cannot be measured here."""
    match result:
        case Refusal():
            said = refusal.refusal(cell, result.message, expectations)
            return None if said.expected else said.as_cause
        case Measured(observations=found) if bad := [row for one in found for row in one.header.nonfinite]:
            where = f"prompt {bad[0].prompt} {bad[0].phase} {at(bad[0].phase, bad[0].position)}"
            return Cause(Verdict.INVALID, cell, "", f"non-finite logits, first {where}")
        case Missing(verdict=Verdict.ERROR | Verdict.TIMEOUT | Verdict.INVALID):
            return missing(cell, result)
    return None


def missing(cell: Cell, result: Missing) -> Cause:
    """The verdict, the cell and the reason in one line, and the rest."""
    first, rest = result.first, result.reason[len(result.first) + 1 :]
    if _POINTS_ELSEWHERE.search(first) and result.excerpt and (words := _reason(result)):
        first = f"{words} ({first})"
    # Where a log is differs from one engine of a cell to the next, the cause does not: it stands below.
    lines = [rest, *(f"    | {line}" for line in result.excerpt), f"  log: {result.log}" if result.log else ""]
    return Cause(result.verdict, cell, "", first, "\n".join(filter(None, lines)))


def of_reexecution(
    results: Mapping[Cell, Result], own: Collection[Cell], known: Callable[[Cell], Expectations]
) -> Cause | None:
    """What kept the first of the verifying cells from re-executing a claim that could not be judged.

    Of formats that were refused only those with the claim's numbers (`own`) can be it: others may be lacking.
    """
    broken = {cell: found for cell, result in results.items() if (found := of(cell, result, known(cell))) is not None}
    some = [cell for cell in broken if not isinstance(results[cell], Refusal)] or [cell for cell in broken if cell in own]
    return broken[some[0]] if some else None


def _reason(result: Missing) -> str:
    """The last line of the log that says why, of the excerpt or else of the log itself; empty if none does."""
    for lines in (result.excerpt, _end(result.log)):
        for line in reversed(lines):
            found = _REASONS.search(line)
            if found is not None and not _POINTS_ELSEWHERE.search(found[0]):
                words = found[0].strip()
                return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."
    return ""


def _end(log: str) -> Sequence[str]:
    """The last lines of a log, as plain text; none where it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, Path(log).stat().st_size - _MOST))
            return [plain(line) for line in file.read(_MOST).decode("utf-8", "replace").splitlines()]
    except OSError:
        return []
