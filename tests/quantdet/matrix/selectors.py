"""Rows of the matrix that say something of cells which they select: expectations, settings, questions."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantdet.matrix.cell import Cell, EngineName, Phase, matches_any
from quantdet.matrix.rows import Dtype, SettingArgs
from quantdet.matrix.values import Environment, Row


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
    args: SettingArgs = Field(default_factory=dict)
    env: Environment = Field(default_factory=dict)
    dtype: Dtype | None = None
    onednn_fp8: bool | None = None
