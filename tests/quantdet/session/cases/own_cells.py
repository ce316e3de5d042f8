"""Cells of somebody's own checkpoint of which there is nothing to judge: one case says why, and the others are skipped."""

from quantdet.matrix.cell import Cell
from quantdet.session.session import Session


def told_by_another(session: Session, test: str, cell: Cell, *, tried: bool = False) -> str:
    """What a skip of `test` adds to the reason; empty: this case has to tell it, as a failure.

    Args:
        test: the name of the case.
        tried: the engine refused the cell. Where the suite itself chose the kernel, to see whether it can be had, that is no
            failure of anybody.
    """
    if session.matrix.models[cell.model_id].checkpoint is None:
        return ""
    if tried and session.matrix.formats[cell.format_id].kernel not in ("auto", "unquantized"):
        return " (a kernel that was tried)"
    teller = session.told.setdefault(cell, test)
    return "" if teller == test else f" (told by {teller})"
