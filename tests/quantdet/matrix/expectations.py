"""What the matrix expects of a cell: rows of `[[expect]]` looked up for a question."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from quantdet.matrix.matrix import Matrix
from quantdet.matrix.rows import Cell, EngineName, Phase
from quantdet.matrix.selectors import PAIRED, Expect
from quantdet.matrix.shapes import Layers


def _unknown(_: Cell) -> Layers | None:
    return None


@dataclass(frozen=True)
class Expectations:
    """The rows that hold for the installed vLLM (all of them where none is installed), and the layers of cells."""

    rows: tuple[Expect, ...]
    layers: Callable[[Cell], Layers | None] = _unknown
    engines: Mapping[str, EngineName] = field(default_factory=dict)  # by format; one that is not there: vLLM
    unseen: tuple[str, ...] = ()  # environment variables that change what a kernel computes, see `schema.Engine`
    family: Callable[[str], str] = str  # the kernel of the matrix that shows a class name
    words: Mapping[str, str] = field(default_factory=dict)  # by format, what the matrix calls its numbers

    @classmethod
    def of(cls, matrix: Matrix, vllm_version: str | None) -> "Expectations":
        rows = tuple(row for row in matrix.expect if row.holds_for(vllm_version))
        engines = {name: format_.engine for name, format_ in matrix.formats.items()}
        words = {name: f"{format_.weights}/{format_.activations}" for name, format_ in matrix.formats.items()}
        return cls(rows, matrix.layers_in, engines, matrix.engine.unseen, matrix.family, words)

    def noise(self, cell: Cell, phase: Phase) -> Expect | None:
        """The row that says that `cell` is, or may be, noisy in `phase`."""
        return self._first(cell, phase, "noisy", "may_be_noisy")

    def unsupported(self, cell: Cell) -> Expect | None:
        """The row that says that the engine refuses `cell`."""
        return self._first(cell, None, "unsupported")

    def drifts(self, cell: Cell) -> Expect | None:
        """The row that lets this version's logits differ from an older one's."""
        return self._first(cell, None, "may_drift")

    def recompiles(self, cell: Cell) -> Expect | None:
        """The row that lets an engine lifetime give other bits than another."""
        return self._first(cell, None, "may_recompile")

    def twins(self, a: Cell, b: Cell) -> Expect | None:
        """The row that declares two formats of one model on one hardware to be IDENTICAL, or DISTINCT, or either of them.

        Such a row is a departure: what is not declared is derived from the numbers and the executed kernels.
        """
        for row in self.rows:
            if row.outcome in PAIRED:
                for one, other in ((a, b), (b, a)):
                    if self._about(row, one) and any(fnmatchcase(other.format_id, glob) for glob in row.formats):
                        found = resolved(row, self.layers(a))
                        if found is not None:
                            return found
        return None

    def _first(self, cell: Cell, phase: Phase | None, *outcomes: str) -> Expect | None:
        layers = self.layers(cell)
        rows = (row for row in self.rows if row.outcome in outcomes and self._about(row, cell, phase))
        return next((found for row in rows if (found := resolved(row, layers)) is not None), None)

    def _about(self, row: Expect, cell: Cell, phase: Phase | None = None) -> bool:
        return row.about(cell, phase, self.engines.get(cell.format_id, "vllm"))


def resolved(row: Expect, layers: Layers | None) -> Expect | None:
    """`row` as it holds for a model with these layers (None: not known); None where it does not.

    The outcome becomes weaker where the layers are not known; the reason says where the kernel's noise comes from, and
    `max_rows` or `min_rows` is computed where it follows from the number of experts.
    """
    condition = row.fires or row.fires_not
    if condition is None:
        return row
    if layers is None:
        weaker = {"noisy": "may_be_noisy", "identical_to": "may_be_identical_to"}
        reason = f"{row.reason}; the dimensions of this model's layers are not known"
        return row.model_copy(update={"outcome": weaker.get(row.outcome, row.outcome), "reason": reason})
    if not row.can_hold(layers):
        return None
    where = condition.where(layers)
    if not where:
        return row.model_copy(update={"reason": f"{row.reason}; fires in no layer of this model"})
    reason = f"{row.reason}; fires in {', '.join(map(str, where))} (N x K)"
    update: dict[str, object] = {}
    if most := [rows for layer in where if (rows := condition.rows(layer)) is not None]:
        update["max_rows"] = max(most)
        reason += f", up to {max(most)} rows"
    if least := [rows for layer in where if (rows := condition.rows_from(layer)) is not None]:
        update["min_rows"] = min(least)
        reason += f", from {min(least)} rows on"
    return row.model_copy(update={**update, "reason": reason})


def describe(row: Expect | None, default: str) -> str:
    """For the `expectation` property: outcome and reason, or the default."""
    return default if row is None else f"{row.outcome}: {row.reason} [{row.source}]"
