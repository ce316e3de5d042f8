"""Questions of published experiments: who is asked, what the answer rests on, and that a wrong answer fails."""

from typing import Any

import pytest

from quantdet.judging import questions
from quantdet.judging.questions import Asked
from quantdet.judging.results import Measured, Missing, Refusal
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell, Phase
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.matrix.selectors import Question
from quantdet.observations.observation import Observation
from selftest.fakes.inner import Suite
from selftest.fakes.judged import one_flip
from selftest.fakes.matrix import MATRIX, QUESTIONS, make_suite, setting
from selftest.fakes.observation import observation

pytest_plugins = ["pytester"]

A, B = Cell("alpha", "a", "cpu-here"), Cell("alpha", "b", "cpu-here")


def question(answer: str, *formats: str) -> Question:
    return Question.model_validate({"asks": "does it?", "source": "here", "answer": answer, "formats": formats})


def answered(kind: str, known: dict[Cell, Any], *expect: dict[str, Any], of: tuple[Cell, ...] = (A, B)) -> Judgement:
    rows = Expectations(tuple(Expect.model_validate({"reason": "r", "source": "s", **row}) for row in expect))
    results = {cell: Measured((one,)) if isinstance(one, Observation) else one for cell, one in known.items()}
    return questions.answer(Asked("alpha", "q", "cpu-here", "", of), question(kind, "a", "b"), results, lambda _: rows)


DECLARED = {"outcome": "noisy", "when": {"format": "b", "phase": "decode"}}


def noisy(format_id: str, phase: Phase = "decode") -> Observation:
    return one_flip(observation(format_id), 0, phase, 1)


def test_two_formats_that_repeat_and_are_distinct() -> None:
    """The answer: both verdicts with n, and how far apart they are."""
    found = answered("apart", {A: observation("a"), B: observation("b")})

    assert (Verdict.DISTINCT, True) == (found.verdict, found.expected)
    assert found.message.startswith("DISTINCT alpha/q/cpu-here: a BIT_EXACT (n = 3), b BIT_EXACT (n = 3); a and b ")
    assert "nats apart" in found.message
    assert ("does it?", "a,b") == (found.figures["asks"], found.figures["closest"])


def test_equal_numbers_are_not_apart() -> None:
    """The first pair that is not distinct is the answer, and fails."""
    found = answered("apart", {A: observation("a", numerics="same"), B: observation("b", numerics="same")})

    assert (Verdict.IDENTICAL, False) == (found.verdict, found.expected)
    assert "a and b 0 nats apart" in found.message


@pytest.mark.parametrize("kind", ["apart", "repeatable"])
@pytest.mark.parametrize(
    ("declared", "fine"), [([], False), ([{"outcome": "noisy"}], True), ([{"outcome": "may_be_noisy"}], True)]
)
def test_noise_has_to_be_declared(kind: str, declared: list[dict[str, Any]], fine: bool) -> None:
    """A repeat that differs is in the answer; it fails where the matrix expects bits."""
    rows = [{**row, "when": {"format": "b", "phase": "decode"}} for row in declared]
    found = answered(kind, {A: observation("a"), B: noisy("b")}, *rows)

    assert fine == found.expected
    assert "NOISY in decode" in found.text or "NOISY: b" in found.message


def test_hidden_noise_fails() -> None:
    """A format that has to be noisy and is not: the answer is not what the matrix expects."""
    found = answered("repeatable", {A: observation("a"), B: observation("b")}, DECLARED)

    assert (Verdict.BIT_EXACT, False) == (found.verdict, found.expected)


def test_what_repeats_and_what_does_not() -> None:
    """By verdict, the noisy ones first, with the kernels that ran."""
    found = answered("repeatable", {A: observation("a"), B: noisy("b")}, DECLARED)

    wanted = "NOISY: b (UnquantizedLinearMethod); BIT_EXACT: a (UnquantizedLinearMethod)"
    assert f"NOISY alpha/q/cpu-here: {wanted}" == found.message
    assert "a (UnquantizedLinearMethod)" == found.figures["answer.BIT_EXACT"]


def test_versions_of_one_format_stand_together() -> None:
    """One name, every version that gave this answer."""
    old, new = Cell("alpha", "a", "cpu-here", "0.20.2"), Cell("alpha", "a", "cpu-here", "0.26.0")
    found = answered("repeatable", {old: observation("a"), new: observation("a")}, of=(old, new))

    assert "BIT_EXACT: a (UnquantizedLinearMethod) [vLLM 0.20.2, 0.26.0]" in found.message


@pytest.mark.parametrize(("kind", "known"), [("apart", {A: observation("a")}), ("repeatable", {}), ("apart", {})])
def test_no_answer_without_the_formats(kind: str, known: dict[Cell, Observation]) -> None:
    """`apart` needs all of them, `repeatable` at least one."""
    found = answered(kind, known)

    assert (Verdict.UNAVAILABLE, False) == (found.verdict, found.expected)


def test_two_of_three_formats_are_no_answer() -> None:
    """`apart` is about all of them."""
    third = Cell("alpha", "c", "cpu-here")
    found = answered("apart", {A: observation("a"), B: observation("b")}, of=(A, B, third))

    assert (Verdict.UNAVAILABLE, False) == (found.verdict, found.expected)
    assert "needs repeats of c" in found.message


def test_apart_needs_two_formats() -> None:
    with pytest.raises(ValueError, match="needs two formats"):
        question("apart", "a", "a")


def test_every_pair_of_a_question_has_its_property(suite: Suite) -> None:
    """Three formats: two of the three pairs have the same second side, two the same first."""
    run = suite("-k", "test_question and three and cpu-here", matrix=MATRIX + QUESTIONS)

    (case,) = run.ran().values()
    assert {"pair.ct.awq", "pair.ct.int8", "pair.awq.int8"} == {name for name in case.properties if name.startswith("pair.")}


@pytest.mark.parametrize("kind", ["apart", "repeatable"])
@pytest.mark.parametrize(
    "broken",
    [
        Missing(Verdict.ERROR, "died by SIGKILL"), Missing(Verdict.TIMEOUT, "took too long"),
        Missing(Verdict.INVALID, "changed"), Refusal("no kernel"),
        observation("b", nonfinite=[{"prompt": "p0", "phase": "decode", "repeat": 0, "position": 0}]),
    ],
    ids=["error", "timeout", "invalid", "refusal", "nan"],
)  # fmt: skip
def test_a_format_that_broke_down_leaves_no_answer(kind: str, broken: Any) -> None:
    """It is not left out: the question is INVALID, and fails."""
    found = answered(kind, {A: observation("a"), B: broken})

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "INVALID alpha/q/cpu-here: b: " in found.message


def test_what_is_not_here_is_named() -> None:
    """Weights that are missing leave an answer about the others, which says so."""
    found = answered("repeatable", {A: observation("a"), B: Missing(Verdict.UNAVAILABLE, "weights: none")})

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert found.message.endswith("; not judged: b")


def test_formats_of_two_environments_are_not_compared() -> None:
    other = observation("b", environment={"vllm": "0.0.1", "torch": "0"})
    found = answered("apart", {A: observation("a"), B: other})

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "cannot be compared with b" in found.message


QUESTION = """
[questions.repeatable]
asks = "Which repeat?"
source = "here"
answer = "repeatable"
formats = ["*"]
"""


@pytest.mark.parametrize("more", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_a_noisy_question_in_a_whole_run(more: list[str], pytester: pytest.Pytester) -> None:
    """With a report, and over workers: each cell is measured once, the question fails where noise was not declared."""
    make_suite(pytester.path, MATRIX + setting("awq", "flip_decode") + QUESTION)

    result = pytester.runpytest_subprocess("-k", "alpha", "--report", "out", "-q", *more)

    result.stdout.fnmatch_lines(["*NOISY alpha/repeatable/cpu-here: NOISY: awq*"])
    assert 1 == result.ret
    assert (pytester.path / "out" / "report.html").is_file()
