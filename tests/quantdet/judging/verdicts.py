"""The closed set of verdict words, and one judgement: verdict, the sentence that says it all, and the figures."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from quantdet.matrix.cell import Cell, Phase


class Verdict(StrEnum):
    """Words of cells, of pairs and of re-executions. `CONFIRMED` is a kernel that ran as requested.

    `DETECTABLE`: another format is farther from a claim than the claimed format. `NOT_DETECTABLE`: it is not, and a
    relevant difference would have been found; always with the minimum detectable effect beside it. `UNDERPOWERED`: too
    few prompts, or too noisy ones, to say either.
    """

    BIT_EXACT = "BIT_EXACT"
    NOISY = "NOISY"
    CONFIRMED = "CONFIRMED"
    UNSUPPORTED = "UNSUPPORTED"
    UNAVAILABLE = "UNAVAILABLE"
    INVALID = "INVALID"
    ERROR = "ERROR"
    TIMEOUT = "TIMEOUT"
    DISTINCT = "DISTINCT"
    IDENTICAL = "IDENTICAL"
    INDISTINCT = "INDISTINCT"
    DETECTABLE = "DETECTABLE"
    NOT_DETECTABLE = "NOT_DETECTABLE"
    UNDERPOWERED = "UNDERPOWERED"


class Divergence(AssertionError):
    """Repeats differ. The only exception that satisfies a `noisy` expectation."""


class Violation(AssertionError):
    """Any other verdict that is not what the matrix expects."""


@dataclass(frozen=True)
class Reference:
    """The published metric of one prompt of two reports, from `a` to `b` and back, nats; None where it cannot be computed.

    steps: of decode, row by row by the number of the step, also after the tokens have parted, as the printed decode tables
    have it; then it tells two texts apart, not two formats.
    """

    id: str
    prefill: float | None
    prefill_back: float | None
    decode: float | None
    decode_back: float | None
    steps: float | None
    steps_back: float | None

    @property
    def swapped(self) -> "Reference":
        """The same from `b` to `a`."""
        forth, back = (self.prefill, self.decode, self.steps), (self.prefill_back, self.decode_back, self.steps_back)
        return Reference(self.id, *(one for both in zip(back, forth, strict=True) for one in both))


@dataclass(frozen=True)
class Pair:
    """Two formats of one model on one hardware, on the same forced token ids. A figure that was not computed is None.

    l2: mean over content positions of the L2 distance of the logprobs over the union of top-k ids, nats;
    max_abs: largest |difference| of a logprob, nats; differing: positions with different full-vocabulary logits, of
    `positions`; basis: the phase that these four are of, decode only for reports without rows of prefill;
    prefill_published: the published metric over the same content
    positions; decode_steps: steps whose context is common; decode_l2: the suite's L2 over these; decode_published: the
    published decode metric, `inf` where tokens part. The published metric takes the ids of its first side, so it has a
    direction: `a` to `b`, and back;
    within: largest distance within either format, where both were repeated;
    chosen_l2, chosen_max: published figures of reports of the generated tokens' logprobs alone (`distances.published_chosen`,
    first repeats, also after the tokens have parted); references: the prompts of two reports, one by one;
    p: of the exact permutation test over repeats, where one of the formats is noisy in prefill, and p_smallest, what these
    numbers of repeats could reach; None where bits decide.
    """

    a: str
    b: str
    verdict: Verdict
    l2: float
    max_abs: float
    differing: int
    positions: int
    basis: Phase = "prefill"
    decode_steps: int | None = None
    decode_l2: float | None = None
    decode_published: float | None = None
    decode_published_back: float | None = None
    within: float | None = None
    prefill_published: float | None = None
    prefill_published_back: float | None = None
    chosen_l2: float | None = None
    chosen_max: float | None = None
    references: tuple[Reference, ...] = ()
    p: float | None = None
    p_smallest: float | None = None

    @property
    def swapped(self) -> "Pair":
        """The same pair from `b` to `a`."""
        return replace(
            self, a=self.b, b=self.a,
            decode_published=self.decode_published_back, decode_published_back=self.decode_published,
            prefill_published=self.prefill_published_back, prefill_published_back=self.prefill_published,
            references=tuple(one.swapped for one in self.references),
        )  # fmt: skip

    @property
    def figures(self) -> str:
        """`name=value` of every figure that there is, for one property; those of printed tables with their digits."""
        found = [f"{self.verdict} l2={self.l2:.6g} max_abs={self.max_abs:.6g} differing={self.differing}/{self.positions}"]
        found += [f"basis={self.basis}"] if self.basis != "prefill" else []
        named = {name: getattr(self, name) for name in _FIGURES}
        found += [f"{name}={value:.6g}" for name, value in named.items() if value is not None]
        printed = {name: getattr(self, name) for name in ("chosen_l2", "chosen_max")}
        found += [f"{name}={value:.6e}" for name, value in printed.items() if value is not None]
        return " ".join(found)


_FIGURES = (
    "prefill_published", "prefill_published_back", "decode_steps", "decode_l2", "decode_published", "decode_published_back",
    "within", "p", "p_smallest",
)  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """What went wrong with a cell, whatever test met it first; equal ones are one entry of the report.

    `why`: the engine's own words, in one line; `aspect`: see `Judgement`. `detail` (the log's end, say) may differ from case
    to case.
    """

    verdict: Verdict
    cell: Cell
    aspect: str
    why: str
    detail: str = field(default="", compare=False)

    @property
    def first(self) -> str:
        """Verdict, cell and reason in one line."""
        return _line(self.verdict, self.cell, self.aspect, self.why)


@dataclass(frozen=True)
class Judgement:
    """What one test says: the verdict, on what, and why; the sentence is made of these (`message`).

    `subject`: the cell, claim or question; `aspect`: what of it was judged (`decode`, `kernel`, `distinct`, ...), empty for all
    of it; `why`: the reason in one line. `expected`: whether this is what the matrix expects;
    `figures` become properties of the JUnit test case; `detail` follows the message where there is room; `declared`
    False: noise of a kind that no expectation of noise may excuse; `reexecution`: what the report's tables of re-execution
    are made from. `cause`: the one that other cases fail for too; `among`: cells that the verdict is about alike, each of
    which says the same of the others.
    """

    verdict: Verdict
    subject: Cell
    aspect: str
    why: str
    expected: bool
    figures: dict[str, Any] = field(default_factory=dict)
    detail: str = ""
    pairs: tuple[Pair, ...] = ()
    declared: bool = True
    reexecution: dict[str, Any] | None = None
    cause: Cause | None = None
    among: frozenset[str] = frozenset()

    @property
    def where(self) -> str:
        """Subject and aspect, for example `tiny-qwen3/awq/cpu-amx decode`."""
        return f"{self.subject} {self.aspect}".rstrip()

    @property
    def message(self) -> str:
        """One line that starts with the verdict, for example `NOISY tiny-qwen3/awq/cpu-amx decode: 1 of 5 repeats differ`."""
        return _line(self.verdict, self.subject, self.aspect, self.why)

    @property
    def reason(self) -> str:
        """Aspect and why, for a skip: the case names the subject itself."""
        return f"{self.aspect}: {self.why}" if self.aspect else self.why

    @property
    def text(self) -> str:
        """The message, and the detail below it."""
        return f"{self.message}\n{self.detail}".rstrip()

    @property
    def as_cause(self) -> Cause:
        """What it is for every case that fails for it."""
        return Cause(self.verdict, self.subject, self.aspect, self.why, self.detail)

    def enforce(self) -> None:
        """Raise unless this is what the matrix expects."""
        __tracebackhide__ = True
        if not self.expected:
            raise (Divergence if self.verdict is Verdict.NOISY and self.declared else Violation)(self.text)


def _line(verdict: Verdict, subject: Cell, aspect: str, why: str) -> str:
    return f"{verdict} {f'{subject} {aspect}'.rstrip()}: {why}"
