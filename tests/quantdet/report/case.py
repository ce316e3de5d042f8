"""A judged case, as every report reads it: verdict, reasons and figures, numbers as numbers.

It crosses pytest-xdist and lies in `cases.jsonl` as a plain tree (`to_json`), and is checked when it comes back
(`from_json`): such a file may be anybody's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from quantdet.judging.verdicts import Pair, Verdict


@dataclass(frozen=True)
class SharedCause:
    """The cause that a case shares with others (`judging.verdicts.Cause`): its cell, first line, and what stands below."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cell: str
    first: str
    detail: str


@dataclass(frozen=True, order=True)
class Place:
    """Where a case was measured: of one model, on one hardware, and with which vLLM where a run has several versions."""

    model: str
    hardware: str
    vllm: str = ""

    def __str__(self) -> str:
        return f"{self.model} on {self.hardware}{f', vLLM {self.vllm}' if self.vllm else ''}"


@dataclass(frozen=True)
class Case:
    """What one test said of one cell, claim or question.

    test: the function's name; outcome: pytest's word for it. where, why, message, detail, pairs: see
    `judging.verdicts.Judgement`; expected: also a declared divergence. among: the cells that the verdict is about alike.
    reexecution, evidence: see `judging.reexecution.claim` and `report.evidence`; trees of plain values.
    figures: by the name of the JUnit property. Numbers, booleans, texts, lists of texts and tables of numbers; what was not
    computed is not there.
    link, command: of a page alone, where the observation lies from there, and what runs the case again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    nodeid: str
    test: str
    outcome: str
    verdict: Verdict
    where: str
    why: str
    message: str
    expected: bool
    detail: str = ""
    cause: SharedCause | None = None
    among: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    reexecution: dict[str, Any] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    link: str = ""
    command: str = ""

    # ------------------------------------------------------------------- figures; one of another kind is none of this name

    def number(self, name: str) -> float | None:
        value = self.figures.get(name)
        return value if _is_number(value) else None

    def text(self, name: str) -> str:
        value = self.figures.get(name)
        return value if isinstance(value, str) else ""

    def names(self, name: str) -> list[str]:
        value = self.figures.get(name)
        return [str(one) for one in value] if isinstance(value, list | tuple) else []

    def parts(self, name: str) -> dict[str, float]:
        value = self.figures.get(name)
        return {part: one for part, one in value.items() if _is_number(one)} if isinstance(value, dict) else {}

    # -------------------------------------------------------------------------------------------- what reports ask for most

    @property
    def model(self) -> str:
        return self.text("case.model")

    @property
    def format(self) -> str:
        return self.text("case.format")

    @property
    def hardware(self) -> str:
        return self.text("case.hardware")

    @property
    def vllm(self) -> str:
        """The version that a recording was made with, where a run has several; else empty."""
        return self.text("case.vllm")

    @property
    def place(self) -> Place:
        return Place(self.model, self.hardware, self.vllm)

    @property
    def engine(self) -> str:
        return self.text("case.engine")

    @property
    def phase(self) -> str:
        return self.text("case.phase")

    @property
    def expectation(self) -> str:
        return self.text("expectation")

    @property
    def runs(self) -> int | None:
        """Repeats that were judged; of a re-execution, its prompts."""
        value = self.number("runs")
        return value if isinstance(value, int) else None

    @property
    def flip_rate(self) -> float | None:
        """The upper 95 % bound."""
        return self.number("flip_rate_upper95")

    @property
    def requested(self) -> str:
        """The matrix's kernel."""
        return self.text("kernel.requested")

    @property
    def executed(self) -> str:
        return self.text("kernel.executed")

    @property
    def weight_only(self) -> bool:
        """Whether it is known that activations were not quantized, though the format does."""
        return self.figures.get("kernel.weight_only") is True

    @property
    def controlled(self) -> bool:
        """Whether the hardware's controls were caught, so that a BIT_EXACT counts."""
        return self.text("controlled") == "yes"

    def without(self, *names: str) -> "Case":
        """The case without these figures."""
        return replace(self, figures={name: value for name, value in self.figures.items() if name not in names})

    # ------------------------------------------------------------------------------------------------ to and from plain trees

    def to_json(self) -> dict[str, Any]:
        """Dictionaries, lists, texts, numbers, booleans and None alone; numbers may be `inf` and `nan`."""
        tree: dict[str, Any] = _plain(asdict(self))
        return tree

    @classmethod
    def from_json(cls, tree: Any) -> "Case":
        """What `to_json` gave.

        Raises:
            ValueError: something else.
        """
        return _adapter().validate_python(tree)


@cache
def _adapter() -> TypeAdapter[Case]:
    return TypeAdapter(Case)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Enum | str):
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)  # also numpy's, which execnet does not carry
    return _plain(value.item()) if hasattr(value, "item") else str(value)
