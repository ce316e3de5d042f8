"""What the matrix expects of a cell: rows of `[[expect]]` looked up for a question."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantdet.matrix import Matrix
from quantdet.schema import Cell, Expect, Phase


@dataclass(frozen=True)
class Expectations:
    """The rows that hold for the installed vLLM (all of them where none is installed)."""

    rows: tuple[Expect, ...]

    @classmethod
    def of(cls, matrix: Matrix, vllm_version: str | None) -> "Expectations":
        return cls(tuple(row for row in matrix.expect if row.holds_for(vllm_version)))

    def noise(self, cell: Cell, phase: Phase) -> Expect | None:
        """The row that says that `cell` is, or may be, noisy in `phase`."""
        return self._first(cell, phase, "noisy", "may_be_noisy")

    def unsupported(self, cell: Cell) -> Expect | None:
        """The row that says that the engine refuses `cell`."""
        return self._first(cell, None, "unsupported")

    def drifts(self, cell: Cell) -> Expect | None:
        """The row that lets this version's logits differ from an older one's."""
        return self._first(cell, None, "may_drift")

    def twins(self, a: Cell, b: Cell) -> Expect | None:
        """The row that declares two formats of one model on one hardware to be the same numerics."""
        for row in self.rows:
            if row.outcome == "identical_to":
                for one, other in ((a, b), (b, a)):
                    if row.when.matches(one) and any(fnmatchcase(other.format_id, glob) for glob in row.formats):
                        return row
        return None

    def _first(self, cell: Cell, phase: Phase | None, *outcomes: str) -> Expect | None:
        return next((row for row in self.rows if row.outcome in outcomes and row.when.matches(cell, phase)), None)


def describe(row: Expect | None, default: str) -> str:
    """For the `expectation` property: outcome and reason, or the default."""
    return default if row is None else f"{row.outcome}: {row.reason} [{row.source}]"
