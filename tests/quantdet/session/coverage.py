"""Every cell of the matrix: tested in this run, or why not."""

from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.report.record import Records
from quantdet.session.session import Session


def coverage(matrix: Matrix, session: Session, records: Records) -> list[dict[str, str]]:
    """Every cell of the matrix: `tested`, or why not."""
    tested = {f"{case.model}/{case.format}/{case.hardware}" for case in records.cases}
    broken = {_case_id(nodeid).partition("@")[0] for nodeid, _ in records.broken}
    reasons: dict[str, str] = {}
    for nodeid, reason in sorted(records.skipped):
        reasons.setdefault(_case_id(nodeid).partition("@")[0], reason)
    rows = []
    for cell in matrix.cells():
        state, reason = "tested", ""
        if cell.id not in tested:
            state, reason = ("broken", "broke down, see above") if cell.id in broken else ("untested", reasons.get(cell.id, ""))
            reason = reason or _why_not(session, records, cell)
        rows.append({"model": cell.model_id, "format": cell.format_id, "hardware": cell.hardware_id, "state": state} | (
            {"reason": reason} if reason else {}
        ))  # fmt: skip
    return rows


def _why_not(session: Session, records: Records, cell: Cell) -> str:
    """Why a cell was not collected, or deselected: what it would have needed, if that is not here."""
    wanted = session.options.hardware
    if wanted is not None and cell.hardware_id != wanted:
        return f"not asked for: --hardware {wanted}"
    cells = session.evidence.expand([cell]) or [cell]
    if records.cut and any(one in session.selected for one in cells):
        return "selected, not reached: the run was cut short"
    reasons = [session.gate(one) for one in cells]
    # Under xdist the workers alone know what was selected.
    unsure = records.cut and not session.selected
    left = "not selected, or not reached before the run was cut short" if unsure else "not selected in this run"
    return left if None in reasons else f"{Verdict.UNAVAILABLE} {reasons[0]}"


def _case_id(nodeid: str) -> str:
    return nodeid.rpartition("[")[2].removesuffix("]").removesuffix("-decode").removesuffix("-prefill")
