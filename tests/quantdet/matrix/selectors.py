"""Rows of the matrix that say something of cells which they select: expectations, settings, questions."""

import re
from typing import Annotated, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, Field, model_validator

from quantdet.matrix.rows import Args, Cell, Dtype, EngineName, Environment, Phase, Row, Specifier, matches_any
from quantdet.matrix.shapes import Fires, Layers, PositiveInt


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


class When(Row):
    """Selector of an expectation: every key given must match (globs; a list matches any)."""

    model: str | tuple[str, ...] = "*"
    format: str | tuple[str, ...] = "*"
    hardware: str | tuple[str, ...] = "*"
    phase: Phase | None = None
    engine: EngineName | Literal["*"] = "*"

    def matches(self, cell: Cell, phase: Phase | None = None, engine: EngineName = "vllm") -> bool:
        """Whether the row speaks of `cell`; a row for one phase does not match a question about the other."""
        return (
            matches_any(cell.model_id, self.model)
            and matches_any(cell.format_id, self.format)
            and matches_any(cell.hardware_id, self.hardware)
            and self.engine in ("*", engine)
            and (self.phase is None or phase is None or phase == self.phase)
        )


# Outcomes about two formats.
PAIRED = ("identical_to", "may_be_identical_to", "distinct_from")


class Expect(Row):
    """A declared departure from the default: accepted, bit-exact, IDENTICAL to formats that are the same numerics and no other.

    `identical_to`, `distinct_from`: another answer than `numerics.sameness` derives; `may_be_identical_to`: either passes.

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
        "may_recompile",
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


class Question(Row):
    """A question of a published experiment, answered by one case from the verdicts of several formats.

    `apart`: all of `formats` (names) repeat as expected, and every two are distinct. `repeatable`: which of `formats`
    (globs) repeat bit for bit and which do not, in every vLLM version that is judged.
    """

    asks: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    answer: Literal["apart", "repeatable"]
    formats: tuple[str, ...] = Field(min_length=1)
    model: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _two(self) -> "Question":
        if self.answer == "apart" and len(set(self.formats)) < 2:
            raise ValueError("answer 'apart' needs two formats or more")
        return self


class Setting(Row):
    """What some cells need beyond `[engine]`.

    `dtype`: the only one that the kernel takes there; tokens that were generated in another one are not re-executed by it.
    `onednn_fp8 = false`: torch._scaled_mm uses torch's own CPU code instead of oneDNN's.
    """

    when: When
    reason: Annotated[str, Field(min_length=1)]
    args: Args = Field(default_factory=dict)
    env: Environment = Field(default_factory=dict)
    dtype: Dtype | None = None
    onednn_fp8: bool | None = None
