"""Engines that refuse, as declared or not."""

import pytest

from quantdet.judging import refusal
from quantdet.judging.verdicts import Verdict, Violation
from selftest.fakes.judged import CELL, expecting, row


def test_a_refusal_is_expected_only_if_declared() -> None:
    """UNSUPPORTED with the engine's words; undeclared it fails and says which row would declare it."""
    declared = refusal.refusal(CELL, "no kernel", expecting("unsupported"))
    undeclared = refusal.refusal(CELL, "no kernel", expecting("unsupported", format="gptq"))

    assert "UNSUPPORTED alpha/bf16/cpu-here: engine refused: no kernel" == declared.message == undeclared.message
    assert (True, False) == (declared.expected, undeclared.expected)
    assert "outcome = 'unsupported'" in undeclared.detail
    with pytest.raises(Violation):
        undeclared.enforce()


def test_a_format_that_is_taken_against_the_matrix_is_invalid() -> None:
    """The engine takes what the matrix says it refuses: INVALID."""
    found = refusal.refusal(CELL, None, expecting("unsupported"))

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)


def test_a_refusal_for_another_reason_is_not_the_declared_one() -> None:
    """`match` says which words the declared refusal has; others may be a broken installation."""
    declared = row({"when": {}, "outcome": "unsupported", "match": "no .* kernel"})

    assert refusal.refusal(CELL, "ValueError: no FP4 kernel here", declared).expected
    other = refusal.refusal(CELL, "ImportError: libcuda.so", declared)
    assert (Verdict.INVALID, False) == (other.verdict, other.expected)
    assert "refused for another reason than the declared one ('no .* kernel'): ImportError" in other.message


def test_a_long_refusal_is_cut() -> None:
    """The message stays one readable line."""
    found = refusal.refusal(CELL, "x" * 5000, expecting("unsupported"))

    assert len(found.message) < 400
    assert found.message.endswith("...")
