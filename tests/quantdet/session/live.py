"""Evidence that is measured here: a cell's engine lifetimes, controls and re-executions, each at most once.

What the store has is not measured again; an engine that refused or died in this run is not started again.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantdet import checkpoints
from quantdet.engines.plan import Plan
from quantdet.judging.results import Lack, Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.observations.claims import Sequences
from quantdet.observations.observation import Observation
from quantdet.session import plans
from quantdet.session.lost_engines import Lost
from quantdet.session.machine.environment import environment_on
from quantdet.session.machine.gate import gate
from quantdet.session.measuring import Measuring
from quantdet.session.scope import Scope


class Live:
    """See `evidence.Evidence`."""

    replayed = False

    def __init__(self, scope: Scope, measuring: Measuring) -> None:
        self.scope, self.measuring = scope, measuring
        self.lost = Lost(scope.store.root, scope.run)
        self._cells = frozenset(scope.matrix.cells())

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.scope.options.store,)

    def expand(self, cells: Iterable[Cell]) -> list[Cell]:
        """As they are, without those of rows that limit a CPU, unless such a row is asked for."""
        wanted, hardware = self.scope.options.hardware, self.scope.matrix.hardware
        return [cell for cell in cells if wanted is not None or not hardware[cell.hardware_id].limits]

    def here(self, hardware_id: str) -> bool:
        row = self.scope.matrix.hardware[hardware_id]
        return self.scope.machine.has(row) if row.limits else hardware_id in self.scope.machine.rows(self.scope.matrix)

    def gate(self, cell: Cell) -> Lack | None:
        scope = self.scope
        return gate(scope.matrix, cell, scope.machine, scope.software, ignore_native=scope.options.ignore_native)

    def versions(self, hardware_id: str) -> list[str]:
        return []

    def vllm(self, cell: Cell) -> str | None:
        return self.scope.software.vllm

    def measured_with(self, matrix: Matrix) -> Mapping[str, list[str]]:
        software = self.scope.software
        return {} if software.vllm is None or software.flavour is None else {software.flavour: [software.vllm]}

    def lifetimes(self, cell: Cell, asked: int) -> int:
        return asked

    def hidden_states(self, cell: Cell) -> bool:
        matrix = self.scope.matrix
        eager = matrix.formats[cell.format_id].mode == "eager"
        return eager and matrix.models[cell.model_id].hidden_states and not self.scope.options.no_hidden_states

    def pinned(self, cell: Cell) -> bool:
        matrix = self.scope.matrix
        format_ = matrix.formats[cell.format_id]
        if matrix.engine_of(cell) != "vllm" or format_.kernel in ("auto", "unquantized"):
            return True
        pin = matrix.pin_for(format_, self.scope.software.vllm or "0", matrix.models[cell.model_id])
        return pin is not None and not pin.unsupported

    def result(self, cell: Cell) -> Result:
        return _safely(self._measure, cell)

    def peer(self, cell: Cell) -> Result | None:
        """What the store holds."""
        known = self.measuring.stored(cell)
        if known is None:
            return None
        self.measuring.record([known])  # what a verdict rests on belongs to the recording
        return Measured((known,), reused=True)

    def control(self, cell: Cell, kind: str) -> Result:
        return _safely(self._control, cell, kind)

    def verifiers(self) -> list[str]:
        """What vLLM runs on here."""
        scope, matrix = self.scope, self.scope.matrix
        rows = [row for row in scope.machine.rows(matrix) if matrix.hardware[row].kind == scope.software.flavour]
        rows = rows or list(scope.machine.rows(matrix))[:1]
        wanted = scope.options.hardware
        return rows + ([wanted] if wanted is not None and matrix.hardware[wanted].limits else [])

    def verifies(self, cell: Cell) -> bool:
        scope = self.scope
        can = self.gate(cell) is None and scope.expectations(cell).unsupported(cell) is None
        return can and cell in self._cells

    def verified(self, cell: Cell, dtype: str, sequences: Sequences) -> Result:
        return _safely(self._verify, cell, dtype, sequences)

    def environment(self, hardware_id: str | None = None) -> dict[str, Any]:
        scope = self.scope
        row = scope.matrix.hardware.get(hardware_id or "")
        return dict(scope.environment if row is None else environment_on(scope.environment, scope.machine, row))

    def plan(self, cell: Cell) -> Plan | None:
        asked = self.measuring.prepare(cell)
        return asked if isinstance(asked, Plan) else None

    # ------------------------------------------------------------------------------------------------- engine lifetimes

    def _measure(self, cell: Cell) -> Result:
        reason = self.gate(cell)
        if reason is not None:
            return Missing(Verdict.UNAVAILABLE, reason)
        plan = self.measuring.prepare(cell)
        if isinstance(plan, Missing):
            return plan
        lifetimes = self.scope.lifetimes(cell)
        observations: list[Observation] = []
        reused = True
        for lifetime in range(lifetimes):
            if lifetime and lifetime == lifetimes - 1 and self.scope.matrix.hardware[cell.hardware_id].kind == "cuda":
                plan = plans.cold(plan, self.scope.matrix)
            outcome, was_there = self._lifetime(cell, plan, lifetime)
            if not isinstance(outcome, Observation):
                return outcome
            if outcome.header.kind == "refusal":
                self.measuring.record([outcome])
                return Refusal(outcome.header.refusal, outcome)
            observations.append(outcome)
            reused = reused and was_there
        self.measuring.clock.cells += 1
        self.measuring.clock.reused += reused
        self.measuring.record(observations)
        return Measured(tuple(observations), reused)

    def _lifetime(self, cell: Cell, plan: Plan, lifetime: int) -> tuple[Observation | Missing | Refusal, bool]:
        """`Measuring.lifetime`, unless the cell's engine has refused or died in this run already: once is enough to know."""
        dtype = str(plan.identity.get("dtype", ""))
        with self.lost.turn(cell, dtype) as loss:
            if loss is not None:
                return loss, False
            outcome, was_there = self.measuring.lifetime(cell, plan, lifetime)
            if not isinstance(outcome, Observation):
                self.lost.remember(cell, dtype, str(plan.identity.get("role", "measure")), outcome)
            return outcome, was_there

    def _verify(self, cell: Cell, dtype: str, sequences: Sequences) -> Result:
        plan = self.measuring.prepare(cell, sequences.workload)
        if isinstance(plan, Missing):
            return plan
        dtype = self.scope.matrix.verifying_dtype(cell, dtype)
        plan = plans.verifying(plan, dtype, sequences.top_k, hidden_states=sequences.hidden_states)
        return self._once(cell, plan)

    def _control(self, cell: Cell, kind: str) -> Result:
        plan = self.measuring.prepare(cell)
        if isinstance(plan, Missing):
            return plan
        try:
            plan = plans.controlling(plan, kind, self.scope.options.checkpoints)
        except (checkpoints.Unavailable, OSError, ValueError) as error:
            return Missing(Verdict.UNAVAILABLE, f"control: {error}")
        return self._once(cell, plan)

    def _once(self, cell: Cell, plan: Plan) -> Result:
        """One engine lifetime of `plan`."""
        outcome, was_there = self._lifetime(cell, plan, 0)
        if not isinstance(outcome, Observation):
            return outcome
        if outcome.header.kind == "refusal":
            return Refusal(outcome.header.refusal, outcome)
        self.measuring.record([outcome])
        return Measured((outcome,), was_there)


def _safely(measure: Callable[..., Result], *args: Any) -> Result:
    """A full disk, or a store that cannot be written, costs the cell and is said."""
    try:
        return measure(*args)
    except OSError as error:
        return Missing(Verdict.ERROR, f"{type(error).__name__}: {error}")
