"""The diagnosis of a noisy cell: an engine lifetime of its own that traces one prompt, kept in the store under its own key.

What it writes is a trace, never an observation: it lies in `STORE/diagnoses`, where no observation is looked for.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantdet.engines.plan import Plan
from quantdet.engines.process import process
from quantdet.judging import first_layer
from quantdet.judging.first_layer import Diagnosis, Trace
from quantdet.judging.results import Missing
from quantdet.matrix.rows import Cell
from quantdet.session import plans
from quantdet.session.machine.environment import slug

if TYPE_CHECKING:
    from quantdet.session.session import Session


def plan_for(plan: Plan, prompt: str, repeats: int) -> Plan:
    """`plan`, but one prompt, with hooks; often enough to see noise again."""
    identity = {**plan.identity, "role": first_layer.ROLE, "repeats": repeats, "prompt": prompt, "traced": first_layer.TRACED}
    prompts = tuple(one for one in plan.prompts if one.id == prompt)
    return replace(plan, identity=identity, prompts=prompts, repeats=repeats, claims=())


def trace(session: "Session", cell: Cell, prompt: str, lifetimes: int = 1) -> tuple[Trace | None, Diagnosis]:
    """The trace of `prompt` and what it shows; from the store, or from engine lifetimes that are started for it.

    `lifetimes`: 2 where noise shows between lifetimes only; their repeats then follow each other in one trace.
    """
    if session.replay is not None:
        return None, first_layer.impossible("a replay starts no engine")
    if session.matrix.formats[cell.format_id].mode != "eager":
        return None, first_layer.impossible("the cell is compiled, and compiled code calls no hooks")
    plan = session.measuring.prepare(cell)
    if isinstance(plan, Missing):
        return None, first_layer.impossible(plan.reason)
    plan = plan_for(plan, prompt, max(plan.repeats, first_layer.REPEATS) if lifetimes == 1 else 2)
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
    found = None if session.options.fresh else first_layer.read(kept)
    return found or _run(session, cell, replace(plan, identity={**plan.identity, "lifetime": lifetime, "key": key}), kept)


def _run(session: "Session", cell: Cell, plan: Plan, kept: Path) -> Trace | Diagnosis:
    log = session.store.log(cell, f"{first_layer.ROLE}{plan.identity['lifetime']}")
    log.unlink(missing_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".trace.", dir=kept.parent))
    limit = session.matrix.run_for(cell).time_limit_s
    try:
        with session.measuring.announced(cell, plan.identity["lifetime"], first_layer.ROLE):
            outcome = process.run(session.engine_for(cell), plan, folder, log, limit)
        written = folder / first_layer.TRACE_FILE
        found = first_layer.read(written) if isinstance(outcome, process.Completed) else None
        if found is None:
            return first_layer.impossible(_why(outcome, log))
        written.replace(kept)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _why(outcome: process.Outcome, log: Path) -> str:
    match outcome:
        case process.TimedOut():
            return f"the diagnosis took longer than {outcome.limit_s:g} s, log: {log}"
        case process.Completed():
            return f"the engine left no whole trace, log: {log}"
    return f"the engine failed: {outcome.message.partition(chr(10))[0]}, log: {log}"
