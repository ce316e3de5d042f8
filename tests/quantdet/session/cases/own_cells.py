"""Cells of somebody's own checkpoint: where there is nothing to judge one case says why; what two of one base differ in."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from quantdet.checkpoints.difference import difference
from quantdet.matrix.cell import Cell
from quantdet.observations.observation import Observation
from quantdet.session.session import Session

TOLD = "(told by"


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
    return "" if teller == test else f" {TOLD} {teller})"


@lru_cache(maxsize=64)
def _differ(one: str, other: str) -> str:
    """What two checkpoints' numbers differ in; each pair is read once in a run."""
    return str(difference(Path(one), Path(other)))


def apart(session: Session, own: Observation, peers: Mapping[Cell, Observation]) -> dict[str, str]:
    """What a cell's checkpoint and those of its peers differ in, where several of one base are compared.

    By the property `apart.FORMAT`: the numbers' part, and whether the same kernels ran; without the pair's distance.
    """
    model, formats = session.matrix.models[own.cell.model_id], session.matrix.formats
    if len(model.checkpoint or ()) < 2:
        return {}
    compared = {
        cell: place
        for cell in (own.cell, *peers)
        if (place := model.checkpoints.get(cell.format_id)) is not None
        and (model.base is None or formats[cell.format_id].layout != "plain")
    }
    mine = compared.get(own.cell)
    others = {cell: place for cell, place in compared.items() if mine not in (None, place)}
    found: dict[str, str] = {}
    for cell, place in others.items():
        one, other = (executed.summary if (executed := seen.header.executed) else "" for seen in (own, peers[cell]))
        try:
            numbers = _differ(str(mine), place)
        except (OSError, ValueError) as error:
            numbers = f"numbers not compared ({type(error).__name__})"
        kernels = f"the same kernels ({one})" if one == other else f"other kernels ({one} against {other})"
        found[f"apart.{cell.format_id}"] = f"{numbers}; {kernels}"
    return found
