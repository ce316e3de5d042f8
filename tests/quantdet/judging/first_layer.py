"""Which layer differs first between repeats of one request: a pure comparison of traces of a model's modules.

A trace has, per repeat, one row for every call of a traced module, in the order in which the calls ended, with digests of
everything that went in and came out. The first layer to differ is the first row whose outputs differ from those of
repeat 0 while its inputs are equal: what differs later may only have inherited it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from quantdet.observations.header import Part
from quantdet.observations.trace import Row, Trace


class Layer(Part):
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


class Diagnosis(Part):
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
    first_in: dict[str, int] = Field(default_factory=dict)
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
