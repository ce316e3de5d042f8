"""What the matrix expects of a cell: rows of `[[expect]]` looked up for a question."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, Field, model_validator

from quantdet.matrix.cell import Cell, EngineName, Phase
from quantdet.matrix.selectors import When
from quantdet.matrix.shapes import Fires, Layers, PositiveInt
from quantdet.matrix.values import Row, Specifier


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


# Outcomes about two formats.
PAIRED = ("identical_to", "may_be_identical_to", "distinct_from")


class Expect(Row):
    """A declared departure from the default: accepted, bit-exact, IDENTICAL to formats that are the same numerics and no other.

    `default`: no departure, whatever the rows behind it say of the cell (with a phase: of its noise there). For files of
    somebody's own, whose rows come first.

    `identical_to`, `distinct_from`: another answer than `same_numerics.sameness` derives; `may_be_identical_to`: either passes.

    `match`: a regular expression that the engine's refusal has to match (outcome `unsupported`). `max_rows`: the noise
    is in forward passes of at most this many rows (tokens); a longer prompt has to be exact. `min_rows`: of at least this many;
    a shorter prompt has to be exact, in decode too. `fires`: the noise is in
    layers that meet this condition; a model without any has to be exact. `fires_not`: the formats are the same where no
    layer meets it. On a model whose layers are not known, both make a row that allows and asks for nothing. `same_kernel`:
    the row holds only where both formats ran kernels of the same name in the matrix. `may_drift`: recordings of
    two vLLM versions may differ although the same kernels ran; the row is about the newer version. `may_recompile`: an
    engine lifetime may give other bits than another, since kernels are compiled and chosen anew; `max_l2`: how far apart
    (nats, mean over the forced positions) two of them may be.
    """

    when: When = When()
    outcome: Literal[
        "noisy", "may_be_noisy", "identical_to", "may_be_identical_to", "distinct_from", "unsupported", "may_drift",
        "may_recompile", "default",
    ]  # fmt: skip
    reason: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    formats: tuple[str, ...] = ()
    max_rows: PositiveInt | None = None
    min_rows: PositiveInt | None = None
    max_l2: Annotated[float, Field(gt=0)] | None = None
    fires: Fires | None = None
    fires_not: Fires | None = None
    match: Annotated[str, AfterValidator(_regex)] = ""
    same_kernel: bool = False
    vllm: Specifier = ""

    @model_validator(mode="after")
    def _formats_where_needed(self) -> "Expect":
        same = self.outcome in PAIRED
        if same != bool(self.formats):
            raise ValueError(f"'formats' names the other formats of {', '.join(PAIRED)}; belongs to no other outcome")
        if self.min_rows is not None and self.max_rows is not None and self.min_rows > self.max_rows:
            raise ValueError("'min_rows' is at most 'max_rows'")
        if self.min_rows is not None and self.outcome not in ("noisy", "may_be_noisy"):
            raise ValueError("'min_rows' belongs to the outcomes 'noisy' and 'may_be_noisy'")
        if self.max_rows is not None and self.outcome not in ("noisy", "may_be_noisy"):
            raise ValueError("'max_rows' belongs to the outcomes 'noisy' and 'may_be_noisy'")
        if (self.max_l2 is not None) != (self.outcome == "may_recompile"):
            raise ValueError("'max_l2' belongs to the outcome 'may_recompile', which needs it")
        if self.fires is not None and self.outcome not in ("noisy", "may_be_noisy"):
            raise ValueError("'fires' belongs to the outcomes 'noisy' and 'may_be_noisy'")
        if self.fires_not is not None and self.outcome != "identical_to":
            raise ValueError("'fires_not' belongs to the outcome 'identical_to'")
        if self.max_rows is not None and self.fires is not None and self.fires.tokens_per_expert_at_most is not None:
            raise ValueError("'max_rows' follows from 'tokens_per_expert_at_most'")
        if self.min_rows is not None and self.fires is not None and self.fires.tokens_per_expert_above is not None:
            raise ValueError("'min_rows' follows from 'tokens_per_expert_above'")
        if self.same_kernel and self.outcome != "identical_to":
            raise ValueError("'same_kernel' belongs to the outcome 'identical_to'")
        if self.match and self.outcome != "unsupported":
            raise ValueError("'match' belongs to the outcome 'unsupported'")
        if self.when.phase is not None and (same or self.outcome in ("unsupported", "may_drift", "may_recompile")):
            raise ValueError(f"outcome {self.outcome!r} cannot depend on a phase")
        return self

    def can_hold(self, layers: Layers | None) -> bool:
        """Whether the row says anything of a model with these layers (None: not known)."""
        if layers is None:
            return True
        return not (self.fires and not self.fires.where(layers)) and not (self.fires_not and self.fires_not.where(layers))

    def about(self, cell: Cell, phase: Phase | None, engine: EngineName) -> bool:
        """Whether the row speaks of `cell`; one of vLLM versions speaks of no other engine."""
        return not (self.vllm and engine != "vllm") and self.when.matches(cell, phase, engine)

    def holds_for(self, vllm_version: str | None) -> bool:
        """Whether the row is about this vLLM version; without a version (nothing installed) every row holds."""
        if not self.vllm or vllm_version is None:
            return True
        return SpecifierSet(self.vllm).contains(Version(vllm_version), prereleases=True)


def _unknown(_: Cell) -> Layers | None:
    return None


@dataclass(frozen=True)
class Expectations:
    """The rows that hold for the installed vLLM (all of them where none is installed), and the layers of cells."""

    rows: tuple[Expect, ...]
    layers: Callable[[Cell], Layers | None] = _unknown
    engines: Mapping[str, EngineName] = field(default_factory=dict)  # by format; one that is not there: vLLM
    unseen: tuple[str, ...] = ()  # environment variables that change what a kernel computes, see `rows.EngineFacts`
    family: Callable[[str], str] = str  # the kernel of the matrix that shows a class name
    words: Mapping[str, str] = field(default_factory=dict)  # by format, what the matrix calls its numbers

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
            if row.outcome == "default" and row.when.phase is None and (self._about(row, a) or self._about(row, b)):
                return None
            if row.outcome in PAIRED:
                for one, other in ((a, b), (b, a)):
                    if self._about(row, one) and any(fnmatchcase(other.format_id, glob) for glob in row.formats):
                        found = resolved(row, self.layers(a))
                        if found is not None:
                            return found
        return None

    def _first(self, cell: Cell, phase: Phase | None, *outcomes: str) -> Expect | None:
        layers = self.layers(cell)
        rows = (row for row in self.rows if row.outcome in (*outcomes, "default") and self._about(row, cell, phase))
        mine = (row for row in rows if row.outcome != "default" or row.when.phase in (None, phase))
        first = next((found for row in mine if (found := resolved(row, layers)) is not None), None)
        return None if first is None or first.outcome == "default" else first

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
