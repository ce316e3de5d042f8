"""Controls of an engine on a hardware: what has to be caught, and what has to be the same, before its BIT_EXACT counts.

Positive: a bit turned over in the real engine's logits in one repeat; one weight integer changed by one; and a kernel
that is known to be noisy, where one exists here. Negative: the same weights under another name, in another process.
The verdicts are pure functions in `control_judgements`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantdet.judging import causes, repeat
from quantdet.judging.controls import bit_flip
from quantdet.judging.results import Measured, Missing
from quantdet.judging.verdicts import Cause, Judgement, Verdict
from quantdet.matrix.cell import PHASES, Cell, EngineName, matches_any

if TYPE_CHECKING:
    from quantdet.session.session import Session

Place = tuple[str, str, EngineName]
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


def cells(session: "Session", name: Name) -> list[Cell]:
    """The control cell of each place (`_place`): the first in the matrix that will do."""
    if session.options.no_controls:
        return []
    found: dict[Place, Cell] = {}
    for cell in session.cells():
        place = _place(session, cell)
        if place not in found and _will_do(session, cell, name):
            found[place] = cell
    return list(found.values())


def _will_do(session: "Session", cell: Cell, name: Name) -> bool:
    if session.replay is not None and name == "bit_flip":
        # A recorded one is whole by itself: the cell that it was seeded in may not have been measured beside it.
        exact = not any(session.expectations(cell).noise(cell, phase) for phase in PHASES)
        return exact and isinstance(session.control(cell, "control"), Measured)

    known = session.expectations(cell)
    format_ = session.matrix.formats[cell.format_id]
    if session.gate(cell) is not None or known.unsupported(cell) is not None or not session.pinned(cell):
        return False
    rows = [known.noise(cell, phase) for phase in PHASES]
    if name == "known_noise":
        return _known_noise(session, cell)
    if any(rows) or (name == "one_integer" and not format_.weights.startswith("int")):
        return False
    kind = "integer" if name == "one_integer" else "control"
    return session.replay is None or isinstance(session.control(cell, kind), Measured)


def status(session: "Session", cell: Cell) -> Status:
    """Whether the controls of this cell's engine, on its hardware, fired; measures them on the first call.

    Under --replay: what was recorded of them.
    """
    if session.options.no_controls:
        return Status(None, "uncontrolled: --no-controls")
    place = _place(session, cell)
    if place not in session.controls:
        session.controls[place] = _status(session, cell)
    return session.controls[place]


def _status(session: "Session", cell: Cell) -> Status:
    noise_caught, noise = _noise(session, cell)
    here = _first(session, "bit_flip", cell)
    if here is None:
        text = "no bit flip recorded" if session.replay is not None else "no cell to turn a bit over in"
        return Status(None, text, noise)
    result = session.control(here, "control")
    if not isinstance(result, Measured) and session.replay is None:
        # The cell itself has been measured: its weights are here and its engine runs.
        own = session.control(cell, "control")
        here, result = (cell, own) if isinstance(own, Measured) else (here, result)
    if not isinstance(result, Measured):
        reason = result.reason if isinstance(result, Missing) else result.message
        died = isinstance(result, Missing) and result.verdict in (Verdict.ERROR, Verdict.TIMEOUT, Verdict.INVALID)
        text = f"bit flip not tried: {here}: {reason.partition(chr(10))[0]}"
        return Status(False, text, noise, died, causes.of(here, result, session.expectations(here)))
    found = bit_flip(result.observations[0])
    if not found.expected:
        return Status(False, found.message, noise, blind=True, cause=cause_of(found, here))
    return Status(noise_caught is not False, f"bit flip caught in {here.model_id}/{here.format_id}", noise)


def cause_of(found: Judgement, cell: Cell) -> Cause | None:
    """What a control that was missed means for every case that would rest on it."""
    return None if found.expected else Cause(str(cell), found.message, found.detail)


def _noise(session: "Session", cell: Cell) -> tuple[bool | None, str]:
    """Whether the kernel that is known to be noisy here showed it; None where there is none."""
    noisy = _first(session, "known_noise", cell)
    if noisy is None:
        mine = [one for one in session.matrix.formats if session.matrix.formats[one].engine == session.matrix.engine_of(cell)]
        rows = [row for row in session.matrix.expect if row.outcome == "noisy"]
        formats = [row.when.format for row in rows if any(matches_any(one, row.when.format) for one in mine)]
        names = ", ".join(f if isinstance(f, str) else "/".join(f) for f in dict.fromkeys(formats)) or "none in the matrix"
        eligible = [one for one in session.cells() if _here(session, one, cell) and _known_noise(session, one)]
        if eligible and session.replay is not None:
            return None, f"known noise not recorded ({', '.join(dict.fromkeys(one.format_id for one in eligible))})"
        return None, f"no kernel known to be noisy is eligible here ({names})"
    result = session.result(noisy)
    where = f"{noisy.model_id}/{noisy.format_id}"
    if isinstance(result, Missing) and result.verdict is Verdict.UNAVAILABLE:
        return None, f"known noise not tried, {where} is UNAVAILABLE"
    if not isinstance(result, Measured):
        return False, f"known noise not tried: {where}"
    found = repeat.repeat(result.observations, "decode", session.expectations(noisy))
    if found.verdict is Verdict.UNAVAILABLE:
        return None, f"known noise not tried, {found.message.removeprefix('UNAVAILABLE ')}"
    caught = found.verdict is Verdict.NOISY
    return caught, f"known noise {'caught' if caught else 'NOT SEEN'} in {where}"


def _first(session: "Session", name: Name, cell: Cell) -> Cell | None:
    return next((one for one in cells(session, name) if _here(session, one, cell)), None)


def _here(session: "Session", one: Cell, cell: Cell) -> bool:
    return _place(session, one) == _place(session, cell)


def _place(session: "Session", cell: Cell) -> Place:
    """Hardware, recorded vLLM version and engine: what is caught in one says nothing of the next."""
    return cell.hardware_id, cell.vllm, session.matrix.engine_of(cell)


def _known_noise(session: "Session", cell: Cell) -> bool:
    row = session.expectations(cell).noise(cell, "decode")
    return row is not None and row.outcome == "noisy"
