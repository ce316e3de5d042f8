"""Questions of the published experiments, each answered by one case from the verdicts of several cells.

A row of the matrix names formats of a model. `apart`: each of them repeats as the matrix expects, and every two are distinct.
`repeatable`: which of them repeat bit for bit and which do not, in every vLLM version that is judged; as the matrix expects.
"""

from typing import TYPE_CHECKING

from quantdet.judging.questions import Asked
from quantdet.matrix.cell import Cell, matches_any

if TYPE_CHECKING:
    from quantdet.session.session import Session


def asked(session: "Session") -> list[Asked]:
    """Every question, for each model and hardware that has all of its formats (`apart`), or any (`repeatable`)."""
    cells = session.cells()
    found: dict[Asked, None] = {}
    for name, question in session.matrix.questions.items():
        groups: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in cells:
            if matches_any(cell.model_id, question.model) and matches_any(cell.format_id, question.formats):
                version = cell.vllm if question.answer == "apart" else ""
                groups.setdefault((cell.model_id, cell.hardware_id, version), []).append(cell)
        for (model_id, hardware_id, version), group in groups.items():
            if question.answer == "repeatable" or {cell.format_id for cell in group} >= set(question.formats):
                found[Asked(model_id, name, hardware_id, version, tuple(group))] = None
    return list(found)


def gate(case: Asked, session: "Session") -> str | None:
    """Why the question cannot be answered here; None if it can be tried."""
    reasons = [_reason(cell, session) for cell in case.of]
    if session.matrix.questions[case.format_id].answer == "apart":
        return next((reason for reason in reasons if reason is not None), None)
    return None if None in reasons else reasons[0]


def _reason(cell: Cell, session: "Session") -> str | None:
    row = session.expectations(cell).unsupported(cell)
    declared = None if row is None else f"question: needs {cell}, which is declared unsupported: {row.reason}"
    return session.gate(cell) or declared


def available(case: Asked, session: "Session") -> tuple[Cell, ...]:
    """The cells of the question that can be measured here."""
    return tuple(cell for cell in case.of if _reason(cell, session) is None)
