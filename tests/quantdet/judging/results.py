"""What is known of a cell after it was measured, replayed, or found missing."""

from dataclasses import dataclass

from quantdet.judging.verdicts import Verdict
from quantdet.observations.observation import Observation


class Lack(str):
    """What stands in the way of a cell, as need and have: `WHAT: needs NEED, have HAVE`, with its parts."""

    what: str
    need: str
    have: str

    def __new__(cls, what: str, need: str, have: str) -> "Lack":
        made = super().__new__(cls, f"{what}: needs {need}, have {have}")
        made.what, made.need, made.have = what, need, have
        return made

    __slots__ = ("have", "need", "what")


@dataclass(frozen=True, repr=False)
class Measured:
    """A cell's observations, one per engine lifetime. `reused`: found in the store."""

    observations: tuple[Observation, ...]
    reused: bool = False


@dataclass(frozen=True)
class Refusal:
    """The engine refused the cell."""

    message: str
    observation: Observation | None = None

    @property
    def first(self) -> str:
        """The first line of the engine's words."""
        return self.message.partition("\n")[0]


@dataclass(frozen=True)
class Missing:
    """The cell was not measured: UNAVAILABLE, UNSUPPORTED (no pin), ERROR, TIMEOUT or INVALID, with the reason.

    `log`: where the engine's log is; `excerpt`: its last lines, of an engine that ended without saying why.
    """

    verdict: Verdict
    reason: str
    log: str = ""
    excerpt: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        """The reason's first line: an engine's own words may have several."""
        return self.reason.partition("\n")[0]


Result = Measured | Refusal | Missing
