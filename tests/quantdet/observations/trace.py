"""Traces of a model's modules: digests of what went into every call and what came out."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from quantdet.observations.header import Part

ROLE = "diagnosis"  # of the engine lifetime that writes a trace; it measures nothing
TRACE_FILE = "trace.json"
TRACED = 1  # raised when other modules are traced, or in another way: older traces are then not taken for new ones
REPEATS = 10
MAX_TRACE_BYTES = 256 << 20
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class TracedModule(Part):
    """A module by its name in the model: its class, kind (linear, attention, norm, ...) and, if known, what it executes."""

    name: str
    module: str
    kind: str = ""
    kernel: str = ""


class RowDifference(Part):
    """How the outputs of one row differ from those of repeat 0: unequal elements of all, largest |difference|."""

    repeat: int = Field(gt=0)
    row: int = Field(ge=0)
    differing: int = Field(ge=0)
    elements: int = Field(gt=0)
    max_abs: float = Field(ge=0)


# (forward call, index into `modules`, digest of the inputs, digest of the outputs)
Row = tuple[int, int, Digest, Digest]


class Trace(Part):
    """All repeats of one request in one engine lifetime. Forward call 0 is the prefill, call c decode step c."""

    schema_: Literal[1] = Field(1, alias="schema")
    prompt: str
    modules: tuple[TracedModule, ...]
    repeats: tuple[tuple[Row, ...], ...]
    gaps: tuple[RowDifference, ...] = ()


def read(path: Path) -> Trace | None:
    """A trace that was written here; None if it is not whole."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            return None
        trace = Trace.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    known = range(len(trace.modules))
    return trace if all(row[1] in known for rows in trace.repeats for row in rows) else None


def write(trace: Trace, path: Path) -> None:
    """Write a trace as JSON."""
    path.write_text(trace.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
