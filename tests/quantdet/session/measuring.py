"""Engines at work: weights and plans are made ready, engine processes started, the store filled.

What is in the store already is not measured again.
"""

import contextlib
import datetime
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantdet import checkpoints
from quantdet.checkpoints import described
from quantdet.checkpoints.flaws import flaws
from quantdet.checkpoints.unchanged import changed
from quantdet.checkpoints.unsound import told, unsound
from quantdet.engines.clock import Clock
from quantdet.engines.plan import Plan
from quantdet.engines.process import outcome as outcomes
from quantdet.engines.process import process, scratch
from quantdet.engines.process.interrupts import held
from quantdet.judging.results import Missing, Refusal
from quantdet.judging.verdicts import Verdict
from quantdet.matrix import workload
from quantdet.matrix.cell import Cell, matches_any
from quantdet.observations import store
from quantdet.observations.header import SCHEMA, Header
from quantdet.observations.observation import HEADER_FILE, Observation, write
from quantdet.observations.store import slug
from quantdet.session import plans
from quantdet.session.machine.machine import variables_for
from quantdet.session.scope import Scope


@dataclass(repr=False)
class Measuring:
    """Prepares and runs engine lifetimes of the cells of `scope`.

    `on_start`: a context manager's maker, called with cell, lifetime and role around each engine process.
    """

    scope: Scope
    clock: Clock = field(default_factory=Clock)
    on_start: Any = None
    _workloads: dict[str, workload.Workload] = field(default_factory=dict)
    _builder: ThreadPoolExecutor | None = None
    _checkpoints: dict[Cell, "Future[checkpoints.Checkpoint]"] = field(default_factory=dict)

    def prepare(self, cell: Cell, given: workload.Workload | None = None) -> Plan | Missing:
        """Workload, weights and arguments of a cell, or why there are none; `given` instead of its model's workload."""
        scope = self.scope
        model = scope.matrix.models[cell.model_id]
        began = time.monotonic()
        try:
            work = self._workload(cell.model_id, model.workload) if given is None else given
            if model.synthetic is not None:
                workload.check_vocab(work, model.synthetic.vocab_size)
            checkpoint = self._checkpoint(cell)
            others = model.synthetic is None and model.package is None
            if others and (why := unsound(checkpoint, scope.matrix.formats[cell.format_id], scope.options.checkpoints)):
                return Missing(Verdict.INVALID, why)
            if work.has_text and not any(checkpoint.path.glob("tokenizer*")):
                need = f"workload {work.id} is text: needs a tokenizer in the checkpoint"
                return Missing(Verdict.INVALID, f"{need}, have none in {checkpoint.path.name}; a workload of ids needs none")
        except checkpoints.Unavailable as error:
            return Missing(Verdict.UNAVAILABLE, f"weights: {error}")
        except workload.WorkloadError as error:
            return Missing(Verdict.INVALID, str(error))
        except described.Mistaken as error:
            return Missing(Verdict.INVALID, f"checkpoint: {'; '.join(error.mistakes)}")
        except (OSError, ValueError, MemoryError) as error:
            return self._damaged(cell, error)
        finally:
            self.clock.checkpoints += time.monotonic() - began
        ranks = scope.matrix.tensor_parallel_size(cell)
        return plans.plan_for(
            cell, scope.matrix, work, checkpoint, scope.environment_on(cell),
            device=variables_for(scope.machine, scope.matrix.hardware[cell.hardware_id], scope.software, ranks),
            vllm_version=scope.software.vllm or "0", engine=scope.engine_name(cell),
            repeats=scope.options.repeats, max_flip_rate=scope.options.max_flip_rate, inject=scope.inject,
            claimed=self._claims(cell) if given is None else None, hidden_states=given is None and scope.hidden_states(cell),
        )  # fmt: skip

    def lifetime(self, cell: Cell, plan: Plan, lifetime: int) -> tuple[Observation | Missing | Refusal, bool]:
        """Lifetime number `lifetime` of what `plan` asks for, and whether the store had it.

        An engine that refuses is an `Observation` of kind "refusal" where the matrix expects that, else a `Refusal`.
        """
        scope = self.scope
        identity = {**plan.identity, "lifetime": lifetime}
        key = plans.key_of(plan, lifetime)
        place = slug(scope.environment_on(cell))
        if scope.options.fresh:
            scope.store.forget(cell, place, key)
        found = scope.store.find(cell, place, key)
        if found is not None:
            return _told(found, plan), True
        role = str(plan.identity.get("role", "measure"))
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        plan = Plan(**{**vars(plan), "identity": {**identity, "key": key, "created": created}})
        log = scope.store.log(cell, f"{plan.identity.get('role', '')}{lifetime}")
        limit = scope.matrix.run_for(cell).time_limit_s
        with held(), self.announced(cell, lifetime, role), scope.store.writing(cell, place, key) as folder:
            began = time.monotonic()
            outcome = process.run(scope.engine_for(cell), plan, folder, log, limit)
            self.clock.engines += time.monotonic() - began
            identity = plan.identity
            what = changed(Path(plan.checkpoint), identity["checkpoint_sha256"], identity["checkpoint_files_sha256"])
            if what is not None:
                outcome = outcomes.Invalid(f"the checkpoint changed while it was measured: {what}", log, 0.0)
            if not isinstance(outcome, outcomes.Completed):  # what a failed engine left is not taken for measured
                (folder / HEADER_FILE).unlink(missing_ok=True)
            if isinstance(outcome, outcomes.Refused) and scope.expectations(cell).unsupported(cell) is not None:
                # Kept only where the matrix expects it: another refusal may be gone the next time.
                header = {**plan.identity, "schema": SCHEMA, "kind": "refusal", "refusal": outcome.message}
                write(folder, Header.model_validate(header), ())
        if not isinstance(outcome, outcomes.Completed):
            self.clock.measured(None)
        match outcome:
            case outcomes.Refused() if scope.expectations(cell).unsupported(cell) is None:
                return Refusal(outcome.message), False
            case outcomes.Lacking():
                return Missing(Verdict.UNAVAILABLE, f"engine: {outcome.message}", str(log)), False
            case outcomes.TimedOut():
                return Missing(Verdict.TIMEOUT, f"no answer within {limit:g} s", str(log)), False
            case outcomes.Invalid():
                return Missing(Verdict.INVALID, outcome.message, str(log)), False
            case outcomes.Crashed():
                return Missing(Verdict.ERROR, outcome.message, str(log), outcome.excerpt), False
        found = scope.store.find(cell, place, key)
        if found is None:
            return Missing(Verdict.ERROR, "the engine completed but left no whole observation", str(log)), False
        self.clock.measured(found.header.timings.get("measure_s"))
        return found, False

    def stored(self, cell: Cell) -> Observation | None:
        """What the store holds of a cell that this run does not measure, if it is still valid; starts no engine."""
        scope = self.scope
        machine = slug(scope.environment_on(cell))
        place = scope.store.root / cell.hardware_id / machine / cell.model_id / cell.format_id
        if scope.options.fresh or not any(place.glob(f"[!.]*/{HEADER_FILE}")):
            return None
        plan = self.prepare(cell)
        if isinstance(plan, Missing):
            return None
        found = scope.store.find(cell, machine, plans.key_of(plan, 0))
        return _told(found, plan) if found is not None and found.header.kind == "observation" else None

    def record(self, observations: list[Observation]) -> None:
        """Copy them into the recording, if one is asked for."""
        if self.scope.options.record is not None:
            for observation in observations:
                store.copy_into(observation, self.scope.options.record)

    @contextlib.contextmanager
    def announced(self, cell: Cell, lifetime: int, role: str) -> Iterator[None]:
        """Around an engine process: count it, and let `on_start` say so."""
        self.clock.started(role)
        with contextlib.nullcontext() if self.on_start is None else self.on_start(cell, lifetime, role):
            yield

    def weights(self, model_id: str, format_id: str) -> checkpoints.Checkpoint:
        """The weights of a format, whether or not it can run here.

        Raises:
            checkpoints.Unavailable, OSError, ValueError: see `checkpoints.resolve`.
        """
        return self._resolve(Cell(model_id, format_id, ""))

    def _checkpoint(self, cell: Cell) -> checkpoints.Checkpoint:
        """The cell's weights; those of the cells to come are built beside the engine that runs meanwhile."""
        scope = self.scope
        if self._builder is None:
            self._builder = ThreadPoolExecutor(1, "quantdet-checkpoints")
            for other in scope.cells():
                if other in scope.selected and other != cell and scope.gate(other) is None:
                    self._checkpoints[other] = self._builder.submit(self._resolve, other)
        future = self._checkpoints.pop(cell, None)
        return self._resolve(cell) if future is None or future.cancel() else future.result()

    def _resolve(self, cell: Cell) -> checkpoints.Checkpoint:
        scope = self.scope
        place = scope.matrix.models[cell.model_id].checkpoints.get(cell.format_id)
        if place is not None:
            cache, download = scope.options.checkpoints, scope.options.allow_download
            return checkpoints.resolve_own(place, scope.options.matrix.parent, cache=cache, allow_download=download)
        return checkpoints.resolve(
            cell.model_id, scope.matrix.models[cell.model_id], scope.matrix.formats[cell.format_id],
            cache=scope.options.checkpoints, allow_download=scope.options.allow_download,
        )  # fmt: skip

    def _damaged(self, cell: Cell, error: Exception) -> Missing:
        """Of somebody's own checkpoint, what is wrong with its files; of others, what happened."""
        place = self.scope.matrix.models[cell.model_id].checkpoints.get(cell.format_id)
        reasons = list(flaws(Path(place))) if place is not None and isinstance(error, ValueError) else []
        return Missing(Verdict.INVALID, told(reasons)) if reasons else Missing(Verdict.ERROR, f"checkpoint: {error}")

    def _claims(self, cell: Cell) -> workload.Workload | None:
        """The workload of the tokens that a recording of `cell` keeps for re-execution."""
        claims = self.scope.matrix.models[cell.model_id].claims
        if claims is None or self.scope.options.record is None or not matches_any(cell.format_id, claims.formats):
            return None
        work = self._workload(cell.model_id, claims.workload)
        if cell.model_id not in self.scope.workloads:
            return work
        # The same prompts again: in a recording each has a name of its own.
        return workload.of_prompts(f"{work.id}-claims", tuple(replace(one, id=f"claim-{one.id}"[:64]) for one in work.prompts))

    def _workload(self, model_id: str, name: str) -> workload.Workload:
        if model_id in self.scope.workloads:
            return self.scope.workloads[model_id]
        if name not in self._workloads:
            self._workloads[name] = workload.find(name, self.scope.prompts, self.scope.options.matrix.parent)
        return self._workloads[name]

    def close(self) -> None:
        """Stop building ahead; remove what a cut-off run left in the store (half-written folders begin with a dot)."""
        if self._builder is not None:
            self._builder.shutdown(wait=False, cancel_futures=True)
        self.scope.store.sweep()
        scratch.sweep()


def _told(found: Observation, plan: Plan) -> Observation:
    """An observation of a store from before they told their numbers, with those of the checkpoint that its key stands for."""
    if found.header.numbers or found.header.kind == "refusal":
        return found
    return replace(found, header=found.header.model_copy(update={"numbers": plan.identity.get("numbers", "")}))
