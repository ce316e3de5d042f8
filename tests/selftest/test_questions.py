"""Questions of published experiments: who is asked, what the answer rests on, and that a wrong answer fails."""

from typing import Any

import pytest

from quantdet import questions
from quantdet.expectations import Expectations
from quantdet.observation import Observation
from quantdet.pairs import pair
from quantdet.questions import Asked
from quantdet.schema import Cell, Expect, Phase, Question
from quantdet.verdicts import Judgement, Verdict
from selftest.fakes import MATRIX, QUESTIONS, observation
from selftest.inner import Suite
from selftest.test_judgements import one_flip

pytest_plugins = ["pytester"]

A, B = Cell("alpha", "a", "cpu-here"), Cell("alpha", "b", "cpu-here")


def question(answer: str, *formats: str) -> Question:
    return Question.model_validate({"asks": "does it?", "source": "here", "answer": answer, "formats": formats})


def answered(kind: str, known: dict[Cell, Observation], *expect: dict[str, Any], of: tuple[Cell, ...] = (A, B)) -> Judgement:
    rows = Expectations(tuple(Expect.model_validate({"reason": "r", "source": "s", **row}) for row in expect))
    measured = {cell: (one,) for cell, one in known.items()}
    return questions.answer(Asked("alpha", "q", "cpu-here", "", of), question(kind, "a", "b"), measured, lambda _: rows, pair)


DECLARED = {"outcome": "noisy", "when": {"format": "b", "phase": "decode"}}


def noisy(format_id: str, phase: Phase = "decode") -> Observation:
    return one_flip(observation(format_id), 0, phase, 1)


def test_two_formats_that_repeat_and_are_distinct() -> None:
    """The answer: both verdicts with n, and how far apart they are."""
    found = answered("apart", {A: observation("a"), B: observation("b")})

    assert (Verdict.DISTINCT, True) == (found.verdict, found.expected)
    assert found.message.startswith("DISTINCT q/alpha/cpu-here: a BIT_EXACT (n = 3), b BIT_EXACT (n = 3); a and b ")
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
    assert f"NOISY q/alpha/cpu-here: {wanted}" == found.message
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


def test_apart_needs_two_formats() -> None:
    with pytest.raises(ValueError, match="needs two formats"):
        question("apart", "a", "a")


def test_every_pair_of_a_question_has_its_property(suite: Suite) -> None:
    """Three formats: two of the three pairs have the same second side, two the same first."""
    run = suite("-k", "test_question and three and cpu-here", matrix=MATRIX + QUESTIONS)

    (case,) = run.ran().values()
    assert {"pair.ct.awq", "pair.ct.int8", "pair.awq.int8"} == {name for name in case.properties if name.startswith("pair.")}
