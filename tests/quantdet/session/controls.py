"""Controls of an engine on a hardware: what has to be caught, and what has to be the same, before its BIT_EXACT counts.

Positive: a bit turned over in the real engine's logits in one repeat; one weight integer changed by one; and a kernel
that is known to be noisy, where one exists here. Negative: the same weights under another name, in another process.
The verdicts are pure functions in `judging.controls`.
"""

from dataclasses import dataclass
from typing import Literal

import pytest

from quantdet.judging import causes, repeat
from quantdet.judging.controls import bit_flip
from quantdet.judging.results import Measured, Missing
from quantdet.judging.verdicts import Cause, Judgement, Verdict
from quantdet.matrix.cell import PHASES, Cell, EngineName, matches_any
from quantdet.session.session import Session

Stack = tuple[str, str, EngineName]
Name = Literal["bit_flip", "same_weights", "one_integer", "known_noise"]


@dataclass(frozen=True)
class Status:
    """What is known of an engine's controls on a hardware.

    `caught`: everything that had to be caught was; None: nothing was tried.
    """

    caught: bool | None
    flip: str
    noise: str = ""
    blind: bool = False  # nothing can be said of this engine: a flip was not seen, or the engine died at it
    cause: Cause | None = None  # of that

    @property
    def text(self) -> str:
        return "; ".join(filter(None, (self.flip, self.noise)))


class Controls:
    """The controls of a run: which cells they are seeded in, and what is known of them; asked for as cases need them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._known: dict[Stack, Status] = {}

    def cells(self, name: Name) -> list[Cell]:
        """The control cell of each engine on each hardware (`_stack`): the first in the matrix that will do."""
        if self.session.options.no_controls:
            return []
        found: dict[Stack, Cell] = {}
        for cell in self.session.cells():
            stack = self._stack(cell)
            if stack not in found and self._will_do(cell, name):
                found[stack] = cell
        return list(found.values())

    def _will_do(self, cell: Cell, name: Name) -> bool:
        if self.session.evidence.replayed and name == "bit_flip":
            # A recorded one is whole by itself: the cell that it was seeded in may not have been measured beside it.
            exact = not any(self.session.expectations(cell).noise(cell, phase) for phase in PHASES)
            return exact and isinstance(self.session.control(cell, "control"), Measured)

        known = self.session.expectations(cell)
        format_ = self.session.matrix.formats[cell.format_id]
        if self.session.gate(cell) is not None or known.unsupported(cell) is not None or not self.session.pinned(cell):
            return False
        rows = [known.noise(cell, phase) for phase in PHASES]
        if name == "known_noise":
            return self._known_noise(cell)
        if any(rows) or (name == "one_integer" and not format_.weights.startswith("int")):
            return False
        kind = "integer" if name == "one_integer" else "control"
        return not self.session.evidence.replayed or isinstance(self.session.control(cell, kind), Measured)

    def status(self, cell: Cell) -> Status:
        """Whether the controls of this cell's engine, on its hardware, fired; measures them on the first call.

        Under --replay: what was recorded of them.
        """
        if self.session.options.no_controls:
            return Status(None, "uncontrolled: --no-controls")
        stack = self._stack(cell)
        if stack not in self._known:
            self._known[stack] = self._status(cell)
        return self._known[stack]

    def _status(self, cell: Cell) -> Status:
        noise_caught, noise = self._noise(cell)
        here = self._first("bit_flip", cell)
        if here is None:
            text = "no bit flip recorded" if self.session.evidence.replayed else "no cell to turn a bit over in"
            return Status(None, text, noise)
        result = self.session.control(here, "control")
        if not isinstance(result, Measured) and not self.session.evidence.replayed:
            # The cell itself has been measured: its weights are here and its engine runs.
            own = self.session.control(cell, "control")
            here, result = (cell, own) if isinstance(own, Measured) else (here, result)
        if not isinstance(result, Measured):
            died = isinstance(result, Missing) and result.verdict in (Verdict.ERROR, Verdict.TIMEOUT, Verdict.INVALID)
            text = f"bit flip not tried: {here}: {result.first}"
            return Status(False, text, noise, died, causes.of(here, result, self.session.expectations(here)))
        found = bit_flip(result.observations[0])
        if not found.expected:
            return Status(False, found.message, noise, blind=True, cause=cause_of(found, here))
        return Status(noise_caught is not False, f"bit flip caught in {here.model_id}/{here.format_id}", noise)

    def _noise(self, cell: Cell) -> tuple[bool | None, str]:
        """Whether the kernel that is known to be noisy here showed it; None where there is none."""
        noisy = self._first("known_noise", cell)
        if noisy is None:
            mine = [
                one
                for one in self.session.matrix.formats
                if self.session.matrix.formats[one].engine == self.session.matrix.engine_of(cell)
            ]
            rows = [row for row in self.session.matrix.expect if row.outcome == "noisy"]
            formats = [row.when.format for row in rows if any(matches_any(one, row.when.format) for one in mine)]
            names = ", ".join(f if isinstance(f, str) else "/".join(f) for f in dict.fromkeys(formats)) or "none in the matrix"
            eligible = [one for one in self.session.cells() if self._here(one, cell) and self._known_noise(one)]
            if eligible and self.session.evidence.replayed:
                return None, f"known noise not recorded ({', '.join(dict.fromkeys(one.format_id for one in eligible))})"
            return None, f"no kernel known to be noisy is eligible here ({names})"
        result = self.session.result(noisy)
        where = f"{noisy.model_id}/{noisy.format_id}"
        if isinstance(result, Missing) and result.verdict is Verdict.UNAVAILABLE:
            return None, f"known noise not tried, {where} is UNAVAILABLE"
        if not isinstance(result, Measured):
            return False, f"known noise not tried: {where}"
        found = repeat.repeat(result.observations, "decode", self.session.expectations(noisy))
        if found.verdict is Verdict.UNAVAILABLE:
            return None, f"known noise not tried, {found.where}: {found.why}"
        caught = found.verdict is Verdict.NOISY
        return caught, f"known noise {'caught' if caught else 'NOT SEEN'} in {where}"

    def _first(self, name: Name, cell: Cell) -> Cell | None:
        return next((one for one in self.cells(name) if self._here(one, cell)), None)

    def _here(self, one: Cell, cell: Cell) -> bool:
        return self._stack(one) == self._stack(cell)

    def _stack(self, cell: Cell) -> Stack:
        """Hardware, recorded vLLM version and engine: what is caught in one says nothing of the next."""
        return cell.hardware_id, cell.vllm, self.session.matrix.engine_of(cell)

    def _known_noise(self, cell: Cell) -> bool:
        row = self.session.expectations(cell).noise(cell, "decode")
        return row is not None and row.outcome == "noisy"


def cause_of(found: Judgement, cell: Cell) -> Cause | None:
    """What a control that was missed means for every case that would rest on it."""
    return None if found.expected else found.as_cause


CONTROLS = pytest.StashKey[Controls]()
