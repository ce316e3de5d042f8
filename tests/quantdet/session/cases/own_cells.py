"""Cells of somebody's own checkpoint: where there is nothing to judge one case says why; what two of one base differ in."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from quantdet.checkpoints.difference import configured_apart, difference
from quantdet.judging import same_numerics
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.matrix.selectors import When
from quantdet.observations.header import Header
from quantdet.observations.observation import Observation
from quantdet.session.session import Session

TOLD = "(told by"


def arguments(session: Session, header: Header) -> dict[str, str]:
    """`engine.args`: of a checkpoint of somebody's own, what it was measured with beside what every cell has."""
    model = session.matrix.models.get(header.model)
    if model is None or model.checkpoint is None:
        return {}
    usual = {**session.matrix.engine.args, "skip_tokenizer_init": True, "enforce_eager": True, "tensor_parallel_size": 1}
    found = {name: value for name, value in header.engine_args.items() if name not in usual or usual[name] != value}
    return {"engine.args": " ".join(f"{name}={value}" for name, value in sorted(found.items()))}


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


def asked(session: Session, own: Observation, peers: Mapping[Cell, Observation]) -> Expectations:
    """What the matrix expects of a cell, but nothing of checkpoints of one base whose numbers, or configurations, differ.

    Whether that shows is what was asked: scales that round to the same in the model's dtype are the same numerics.
    """
    known = session.expectations(own.cell)
    others = [
        cell.format_id
        for cell in _compared(session, own, peers)
        if same_numerics.numbers(peers[cell]) != same_numerics.numbers(own) or _configured(session, own.cell, cell)
    ]
    if not others:
        return known
    when = When(model=own.cell.model_id, format=own.cell.format_id)
    words = {"reason": "whether two checkpoints of one base differ here is the question", "source": "--same-base"}
    row = Expect(when=when, outcome="may_be_identical_to", formats=tuple(others), **words)
    return replace(known, rows=(row, *known.rows))


def _configured(session: Session, one: Cell, other: Cell) -> list[str]:
    """Keys of two checkpoints' configurations that differ, but for how they are quantized."""
    places = session.matrix.models[one.model_id].checkpoints
    try:
        return configured_apart(Path(places[one.format_id]), Path(places[other.format_id]))
    except (OSError, ValueError) as error:
        return [f"config.json not read: {type(error).__name__}"]


def apart(session: Session, own: Observation, peers: Mapping[Cell, Observation]) -> dict[str, str]:
    """What a cell's checkpoint and those of its peers differ in, where several of one base are compared.

    By the property `apart.FORMAT`: the numbers' part, and whether the same kernels ran; without the pair's distance.
    """
    mine = session.matrix.models[own.cell.model_id].checkpoints.get(own.cell.format_id)
    found: dict[str, str] = {}
    for cell, place in _compared(session, own, peers).items():
        one, other = (executed.summary if (executed := seen.header.executed) else "" for seen in (own, peers[cell]))
        try:
            numbers = _differ(str(mine), place)
        except (OSError, ValueError) as error:
            numbers = f"numbers not compared ({type(error).__name__})"
        kernels = f"the same kernels ({one})" if one == other else f"other kernels ({one} against {other})"
        keys = _configured(session, own.cell, cell)
        config = f"; other configurations ({', '.join(keys[:5])})" if keys else ""
        found[f"apart.{cell.format_id}"] = f"{numbers}{config}; {kernels}"
    return found


def _compared(session: Session, own: Observation, peers: Mapping[Cell, Observation]) -> dict[Cell, str]:
    """The peers whose checkpoint is another one of the same base, with its place."""
    model, formats = session.matrix.models[own.cell.model_id], session.matrix.formats
    if len(model.checkpoint or ()) < 2:
        return {}
    found = {
        cell: place
        for cell in (own.cell, *peers)
        if (place := model.checkpoints.get(cell.format_id)) is not None
        and (model.base is None or formats[cell.format_id].layout != "plain")
    }
    mine = found.get(own.cell)
    return {cell: place for cell, place in found.items() if mine not in (None, place)}
