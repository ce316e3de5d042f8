"""What became of an engine process: one of these comes out of `process.run`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Completed:
    """The observation is in the directory that was given."""

    seconds: float


@dataclass(frozen=True)
class Refused:
    """The engine refused the cell; `message` is its own."""

    message: str
    seconds: float


@dataclass(frozen=True)
class Lacking:
    """Something that the engine needs for the cell is not here; `message` is its own."""

    message: str


@dataclass(frozen=True)
class Crashed:
    """The child ended without a completion record, or with an unexpected exception. `excerpt`: the end of its log."""

    message: str
    log: Path
    seconds: float
    excerpt: tuple[str, ...] = ()


@dataclass(frozen=True)
class Invalid:
    """A precondition of the measurement did not hold in the engine."""

    message: str
    log: Path
    seconds: float


@dataclass(frozen=True)
class TimedOut:
    """The time limit was reached and the process group was killed."""

    limit_s: float
    log: Path


Outcome = Completed | Refused | Lacking | Invalid | Crashed | TimedOut
