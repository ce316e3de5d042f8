"""Which layer differs first between repeats of one request: a pure comparison of traces of a model's modules.

A trace has, per repeat, one row for every call of a traced module, in the order in which the calls ended, with digests of
everything that went in and came out. The first layer to differ is the first row whose outputs differ from those of
repeat 0 while its inputs are equal: what differs later may only have inherited it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROLE = "diagnosis"  # of the engine lifetime that writes a trace; it measures nothing
TRACE_FILE = "trace.json"
TRACED = 1  # raised when other modules are traced, or in another way: older traces are then not taken for new ones
REPEATS = 10
MAX_TRACE_BYTES = 256 << 20

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TracedModule(_Part):
    """A module by its name in the model: its class, kind (linear, attention, norm, ...) and, if known, what it executes."""

    name: str
    module: str
    kind: str = ""
    kernel: str = ""


class Gap(_Part):
    """How the outputs of one row differ from those of repeat 0: unequal elements of all, largest |difference|."""

    repeat: int = Field(gt=0)
    row: int = Field(ge=0)
    differing: int = Field(ge=0)
    elements: int = Field(gt=0)
    max_abs: float = Field(ge=0)


# (forward call, index into `modules`, digest of the inputs, digest of the outputs)
Row = tuple[int, int, Digest, Digest]


class Trace(_Part):
    """All repeats of one request in one engine lifetime. Forward call 0 is the prefill, call c decode step c."""

    schema_: Literal[1] = Field(1, alias="schema")
    prompt: str
    modules: tuple[TracedModule, ...]
    repeats: tuple[tuple[Row, ...], ...]
    gaps: tuple[Gap, ...] = ()


class Layer(_Part):
    """The place of a difference, and the first repeat that shows it. `step` in words: "prefill" or "decode step 3"."""

    call: int
    step: str
    repeat: int
    name: str
    module: str
    kind: str = ""
    kernel: str = ""
    differing: int | None = None
    elements: int | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        what = f"{self.module}, {self.kernel}" if self.kernel else self.module
        return f"{self.name} ({what}) in {self.step}"


class Diagnosis(_Part):
    """What the comparison found.

    found: `layer` gave other outputs for equal inputs; between: the inputs of `layer` differ although all that was traced
    before it is equal, so that the difference arose outside of the traced modules; other calls: repeats did not call the
    same modules, from `layer` on; not reproduced: every repeat is equal; not possible: see `reason`.
    `repeats`: repeats traced; `differ`: those that differ from repeat 0; both None where nothing was traced; `first_in`: where
    each of them first differs, by name.
    """

    status: Literal["found", "between", "other calls", "not reproduced", "not possible"]
    prompt: str = ""
    repeats: int | None = None
    differ: int | None = None
    layer: Layer | None = None
    first_in: dict[str, int] = {}
    reason: str = ""

    @property
    def sentence(self) -> str:
        """One line, for a message or a property."""
        seen = f"{self.differ} of {self.repeats} traced repeats differ"
        match self.status:
            case "found":
                return f"{self.layer}; {seen}{self._size}{self._others}"
            case "between":
                return f"outside of the traced layers, before {self.layer}: its inputs differ; {seen}{self._others}"
            case "other calls":
                return f"repeats call different layers from {self.layer} on; {seen}{self._others}"
            case "not reproduced":
                return f"not reproduced in {self.repeats} repeats of prompt {self.prompt} with hooks on every layer"
        return f"not possible: {self.reason}"

    @property
    def _size(self) -> str:
        if self.layer is None or self.layer.elements is None:
            return ""
        return f" ({self.layer.differing} of {self.layer.elements} outputs, |d| up to {self.layer.max_abs:.3g})"

    @property
    def _others(self) -> str:
        rest = [name for name in self.first_in if self.layer is None or name != self.layer.name]
        return f"; others differ first in {', '.join(rest)}" if rest else ""


def impossible(reason: str) -> Diagnosis:
    """No trace, and why."""
    return Diagnosis(status="not possible", reason=reason)


def compare(trace: Trace) -> Diagnosis:
    """The first divergent layer of a trace.

    Every repeat is compared with repeat 0. Where several differ, the earliest row stands for all; of equal rows, the
    lowest repeat.
    """
    found: list[tuple[int, int, str]] = []  # (row, repeat, status)
    base = trace.repeats[0] if trace.repeats else ()
    for repeat, rows in enumerate(trace.repeats[1:], 1):
        first = _first(base, rows)
        if first is not None:
            found.append((first[0], repeat, first[1]))
    common = {"prompt": trace.prompt, "repeats": len(trace.repeats)}
    if not found:
        return Diagnosis(status="not reproduced", differ=0, **common)
    row, repeat, status = min(found)
    names = Counter(_layer(trace, at, one).name for at, one, _ in sorted(found))
    return Diagnosis(
        status=status, differ=len(found), layer=_layer(trace, row, repeat), first_in=dict(names.most_common()), **common
    )


def _first(base: Sequence[Row], rows: Sequence[Row]) -> tuple[int, str] | None:
    """Where `rows` first differ from `base`, and how."""
    for index, (one, other) in enumerate(zip(base, rows, strict=False)):
        if one[:2] != other[:2]:
            return index, "other calls"
        if one[2] != other[2]:
            return index, "between"
        if one[3] != other[3]:
            return index, "found"
    return None if len(base) == len(rows) else (min(len(base), len(rows)), "other calls")


def _layer(trace: Trace, index: int, repeat: int) -> Layer:
    rows = max(trace.repeats[0], trace.repeats[repeat], key=len)
    call, number, _, _ = trace.repeats[repeat][index] if index < len(trace.repeats[repeat]) else rows[index]
    gap = next((gap for gap in trace.gaps if (gap.repeat, gap.row) == (repeat, index)), None)
    figures = {} if gap is None else gap.model_dump(include={"differing", "elements", "max_abs"})
    step = f"decode step {call}" if call else "prefill"
    return Layer(call=call, step=step, repeat=repeat, **trace.modules[number].model_dump(), **figures)


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
