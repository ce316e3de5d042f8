"""What is known of a cell after it was measured, replayed, or found missing."""

from dataclasses import dataclass

from quantdet.judging.verdicts import Verdict
from quantdet.observations.observation import Observation


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


@dataclass(frozen=True)
class Missing:
    """The cell was not measured: UNAVAILABLE, UNSUPPORTED (no pin), ERROR, TIMEOUT or INVALID, with the reason."""

    verdict: Verdict
    reason: str
    log: str = ""


Result = Measured | Refusal | Missing
