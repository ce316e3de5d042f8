"""The diagnosis of a noisy cell: an engine lifetime of its own that traces one prompt, kept in the store under its own key.

What it writes is a trace, never an observation: it lies in `STORE/diagnoses`, where no observation is looked for.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantdet.engines.plan import Plan
from quantdet.engines.process import outcome as outcomes
from quantdet.engines.process import process
from quantdet.judging import first_layer
from quantdet.judging.first_layer import Diagnosis
from quantdet.judging.results import Missing
from quantdet.matrix.cell import Cell
from quantdet.observations import trace as traces
from quantdet.observations.store import slug
from quantdet.observations.trace import Trace
from quantdet.session import plans

if TYPE_CHECKING:
    from quantdet.session.session import Session


def trace(session: "Session", cell: Cell, prompt: str, lifetimes: int = 1) -> tuple[Trace | None, Diagnosis]:
    """The trace of `prompt` and what it shows; from the store, or from engine lifetimes that are started for it.

    `lifetimes`: 2 where noise shows between lifetimes only; their repeats then follow each other in one trace.
    """
    if session.evidence.replayed:
        return None, first_layer.impossible("a replay starts no engine")
    if session.matrix.formats[cell.format_id].mode != "eager":
        return None, first_layer.impossible("the cell is compiled, and compiled code calls no hooks")
    plan = session.measuring.prepare(cell)
    if isinstance(plan, Missing):
        return None, first_layer.impossible(plan.reason)
    plan = plans.tracing_plan(plan, prompt, max(plan.repeats, traces.REPEATS) if lifetimes == 1 else 2)
    whole: Trace | None = None
    for lifetime in range(lifetimes):
        found = _lifetime(session, cell, plan, lifetime)
        if isinstance(found, Diagnosis):
            return None, found
        if whole is not None and whole.modules != found.modules:
            return None, first_layer.impossible("two engine lifetimes have other layers")
        gaps = found.gaps if whole is None else whole.gaps
        whole = found if whole is None else found.model_copy(update={"repeats": whole.repeats + found.repeats, "gaps": gaps})
    assert whole is not None
    return whole, first_layer.compare(whole)


def _lifetime(session: "Session", cell: Cell, plan: Plan, lifetime: int) -> Trace | Diagnosis:
    place = slug(session.environment_on(cell))
    key = plans.key_of(plan, lifetime)
    kept = session.store.root / "diagnoses" / cell.hardware_id / place / cell.model_id / cell.format_id / f"{key[:16]}.json"
    found = None if session.options.fresh else traces.read(kept)
    return found or _run(session, cell, replace(plan, identity={**plan.identity, "lifetime": lifetime, "key": key}), kept)


def _run(session: "Session", cell: Cell, plan: Plan, kept: Path) -> Trace | Diagnosis:
    log = session.store.log(cell, f"{traces.ROLE}{plan.identity['lifetime']}")
    log.unlink(missing_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".trace.", dir=kept.parent))
    limit = session.matrix.run_for(cell).time_limit_s
    try:
        with session.measuring.announced(cell, plan.identity["lifetime"], traces.ROLE):
            outcome = process.run(session.engine_for(cell), plan, folder, log, limit)
        written = folder / traces.TRACE_FILE
        found = traces.read(written) if isinstance(outcome, outcomes.Completed) else None
        if found is None:
            return first_layer.impossible(_why(outcome, log))
        written.replace(kept)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _why(outcome: outcomes.Outcome, log: Path) -> str:
    match outcome:
        case outcomes.TimedOut():
            return f"the diagnosis took longer than {outcome.limit_s:g} s, log: {log}"
        case outcomes.Completed():
            return f"the engine left no whole trace, log: {log}"
    return f"the engine failed: {outcome.message.partition(chr(10))[0]}, log: {log}"
