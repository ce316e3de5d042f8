"""One run of the suite: what was measured of each cell, at most once.

Tests ask for results and judge them; this module remembers.
"""

from dataclasses import dataclass, field, replace

import pytest

from quantdet.engines.clock import Clock
from quantdet.judging import restart
from quantdet.judging.pairs import pair
from quantdet.judging.results import Measured, Result
from quantdet.judging.verdicts import Pair
from quantdet.matrix.cell import Cell
from quantdet.observations.claims import Sequences
from quantdet.observations.observation import Observation
from quantdet.session.live import Live
from quantdet.session.measuring import Measuring
from quantdet.session.replay import Replay
from quantdet.session.scope import Scope


@dataclass(repr=False)
class Session(Scope):
    """State of a run; one per process (each pytest-xdist worker has its own).

    told: which case has said why there is nothing to judge of a cell.
    """

    told: dict[Cell, str] = field(default_factory=dict)
    _results: dict[Cell, Result] = field(default_factory=dict)
    _pairs: dict[tuple[Cell, ...], Pair] = field(default_factory=dict)
    _verified: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    _controls: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    _sequences: dict[tuple[str, str], Sequences] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.measuring = Measuring(self)
        self.evidence = Replay(*self.options.replay) if self.options.replay else Live(self, self.measuring)

    @property
    def clock(self) -> Clock:
        """Where the time went."""
        return self.measuring.clock

    def result(self, cell: Cell) -> Result:
        """The cell's result; measured on the first call."""
        if cell not in self._results:
            self._results[cell] = self.evidence.result(cell)
        return self._results[cell]

    def peers(self, cell: Cell) -> dict[Cell, Observation]:
        """Every other format of the model on the same hardware that this run measures, or the store already holds."""
        found: dict[Cell, Observation] = {}
        for other in self.cells():
            if replace(other, format_id=cell.format_id) != cell or other == cell:
                continue
            if self.gate(other) is not None or self.expectations(other).unsupported(other) is not None:
                continue
            known = other in self.selected or self.evidence.replayed
            result = self.result(other) if known else self.evidence.peer(other)
            if isinstance(result, Measured):
                found[other] = result.observations[0]
        return found

    def spread(self, cell: Cell) -> float | None:
        """How far the engine lifetimes of a cell that this run has measured are apart: largest mean L2 to the first, nats.

        None where there are not two of them.
        """
        result = self._results.get(cell)
        if not isinstance(result, Measured):
            return None
        first, *others = result.observations
        return max((restart.apart(first, other).l2 for other in others), default=None)

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
            self._verified[cell, dtype] = self.evidence.verified(cell, dtype, sequences)
        return self._verified[cell, dtype]

    def control(self, cell: Cell, kind: str) -> Result:
        """A lifetime of `cell` with a seeded defect, measured on the first call.

        `kind`: "control", the same weights under another name, with bits turned over in the last repeat; "integer", weights
        of which one integer is another by 1.
        """
        if (cell, kind) not in self._controls:
            self._controls[cell, kind] = self.evidence.control(cell, kind)
        return self._controls[cell, kind]


SESSION = pytest.StashKey[Session]()
