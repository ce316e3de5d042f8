"""One run of the suite: what was measured of each cell, at most once.

Tests ask for results and judge them; this module remembers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from quantdet import checkpoints
from quantdet.engines.clock import Clock
from quantdet.engines.plan import Plan
from quantdet.judging import restart
from quantdet.judging.pairs import pair
from quantdet.judging.results import Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Pair, Verdict
from quantdet.matrix.cell import Cell
from quantdet.observations.claims import Sequences
from quantdet.observations.observation import Observation
from quantdet.session import plans
from quantdet.session.lost import Lost
from quantdet.session.measuring import Measuring
from quantdet.session.scope import Scope


@dataclass(repr=False)
class Session(Scope):
    """State of a run; one per process (each pytest-xdist worker has its own)."""

    _results: dict[Cell, Result] = field(default_factory=dict)
    _pairs: dict[tuple[Cell, ...], Pair] = field(default_factory=dict)
    _verified: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    _controls: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    _sequences: dict[tuple[str, str], Sequences] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.measuring = Measuring(self)
        self.lost = Lost(self.store.root, self.run)

    @property
    def clock(self) -> Clock:
        """Where the time went."""
        return self.measuring.clock

    def result(self, cell: Cell) -> Result:
        """The cell's result; measured on the first call."""
        if cell not in self._results:
            self._results[cell] = _safely(self._measure, cell) if self.replay is None else self.replay.result(cell)
        return self._results[cell]

    def _measure(self, cell: Cell) -> Result:
        reason = self.gate(cell)
        if reason is not None:
            return Missing(Verdict.UNAVAILABLE, reason)
        plan = self.measuring.prepare(cell)
        if isinstance(plan, Missing):
            return plan
        lifetimes = self.lifetimes(cell)
        observations: list[Observation] = []
        reused = True
        for lifetime in range(lifetimes):
            if lifetime and lifetime == lifetimes - 1 and self.matrix.hardware[cell.hardware_id].kind == "cuda":
                plan = plans.cold(plan, self.matrix)
            outcome, was_there = self._lifetime(cell, plan, lifetime)
            if not isinstance(outcome, Observation):
                return outcome
            if outcome.header.kind == "refusal":
                self.measuring.record([outcome])
                return Refusal(outcome.header.refusal, outcome)
            observations.append(outcome)
            reused = reused and was_there
        self.clock.cells += 1
        self.clock.reused += reused
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

    def peers(self, cell: Cell) -> dict[Cell, Observation]:
        """Every other format of the model on the same hardware that this run measures, or the store already holds."""
        found: dict[Cell, Observation] = {}
        for other in self.cells():
            if replace(other, format_id=cell.format_id) != cell or other == cell:
                continue
            if self.gate(other) is not None or self.expectations(other).unsupported(other) is not None:
                continue
            if other in self.selected or self.replay is not None:
                result = self.result(other)
                if isinstance(result, Measured):
                    found[other] = result.observations[0]
            elif (known := self.measuring.stored(other)) is not None:
                self.measuring.record([known])  # what a verdict rests on belongs to the recording
                found[other] = known
        return found

    def spread(self, cell: Cell) -> float | None:
        """How far the engine lifetimes of a cell that this run has measured are apart: largest mean L2 to the first, nats.

        None where there are not two of them.
        """
        result = self._results.get(cell)
        if not isinstance(result, Measured):
            return None
        first, *others = result.observations
        return max((restart.gap(first, other).l2 for other in others), default=None)

    def compare(self, a: Observation, b: Observation) -> Pair:
        """The pair of two observations of this run, computed once for both directions."""
        ids = (a.cell, b.cell)
        if ids not in self._pairs:
            found = pair(a, b)
            self._pairs[ids], self._pairs[ids[::-1]] = found, found.swapped
        return self._pairs[ids]

    def sequences(self, model_id: str, dtype: str) -> Sequences:
        """What the selected claims of a model that were computed in `dtype` ask to be re-executed."""
        if (model_id, dtype) not in self._sequences:
            claims = [claim for claim in self.claimed if claim.model_id == model_id]
            claims = [claim for claim in claims if self.references.header(claim).dtype == dtype]
            self._sequences[model_id, dtype] = Sequences.of(map(self.references.observation, claims))
        return self._sequences[model_id, dtype]

    def verified(self, cell: Cell, dtype: str) -> Result:
        """The re-execution of these claims by the cell's format, measured on the first call.

        In the claims' dtype, where the format leaves it to the hardware.
        """
        if (cell, dtype) not in self._verified:
            sequences = self.sequences(cell.model_id, dtype)
            if self.replay is not None:
                self._verified[cell, dtype] = self.replay.verified(cell, sequences.workload.sha256)
            else:
                self._verified[cell, dtype] = _safely(self._verify, cell, dtype, sequences)
        return self._verified[cell, dtype]

    def _verify(self, cell: Cell, dtype: str, sequences: Sequences) -> Result:
        plan = self.measuring.prepare(cell, sequences.workload)
        if isinstance(plan, Missing):
            return plan
        dtype = self.matrix.verifying_dtype(cell, dtype)
        plan = plans.verifying(plan, dtype, sequences.top_k, hidden_states=sequences.hidden_states)
        return self._once(cell, plan)

    def control(self, cell: Cell, kind: str) -> Result:
        """A lifetime of `cell` with a seeded defect, measured on the first call.

        `kind`: "control", the same weights under another name, with bits turned over in the last repeat; "integer", weights
        of which one integer is another by 1.
        """
        if (cell, kind) not in self._controls:
            replay = self.replay
            self._controls[cell, kind] = _safely(self._control, cell, kind) if replay is None else replay.control(cell, kind)
        return self._controls[cell, kind]

    def _control(self, cell: Cell, kind: str) -> Result:
        plan = self.measuring.prepare(cell)
        if isinstance(plan, Missing):
            return plan
        try:
            plan = plans.controlling(plan, kind, self.options.checkpoints)
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


SESSION = pytest.StashKey[Session]()
