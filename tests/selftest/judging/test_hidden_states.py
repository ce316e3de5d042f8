"""TODO"""

import dataclasses
from typing import Any

import pytest

from quantdet.judging import hidden_states
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.observation import Observation
from selftest.fakes.hidden_states import differing, hidden
from selftest.fakes.observation import observation


def sample(**fields: Any) -> Observation:
    whole = observation(**fields)
    return dataclasses.replace(whole, hidden=hidden(whole))


def judged(whole: Observation, phase: Phase, **row: Any) -> Judgement:
    fields = {"reason": "because", "source": "here", "when": {"phase": phase}, **row}
    rows = Expectations((Expect.model_validate(fields),) if row else ())
    return hidden_states.repeat([whole], phase, rows)


@pytest.mark.parametrize("phase", PHASES)
def test_equal_repeats_are_bit_exact(phase: Phase) -> None:
    """With n, the bound, and a digest over everything that two machines can compare."""
    found = judged(sample(), phase)

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert "0 of 3 repeats differ in any of 3 layers, flip rate < 0.632 per call" in found.message
    names = ("runs", "hidden_states.layers", "hidden_states.logits", "first_divergence")
    assert (3, 3, "equal", "") == tuple(found.figures[name] for name in names)
    assert 64 == len(found.figures["hidden_states.sha256"])


def test_prefill_names_the_earliest_layer_then_the_earliest_position() -> None:
    """All positions of a layer are computed before the next layer."""
    found = judged(differing(sample(), 1, "prefill", (2, 0), (1, 7), (1, 4), (2, 1)), "prefill")

    assert (Verdict.NOISY, False) == (found.verdict, found.expected)
    assert "1 of 3 repeats differ, first prompt p1 position 4 in repeat 2 in layer model.layers.1" in found.message
    assert "model.layers.1" == found.figures["hidden_states.first_layer"]


def test_decode_names_the_earliest_step_then_the_earliest_layer() -> None:
    """A step is computed whole before the next; the first row is step 1."""
    found = judged(differing(sample(), 0, "decode", (0, 2), (2, 1), (1, 1)), "decode")

    assert "first prompt p0 step 2 in repeat 2 in layer model.layers.1" in found.message


def test_the_first_prompt_is_named() -> None:
    """In reading order."""
    found = judged(differing(differing(sample(), 1, "decode", (0, 0)), 0, "decode", (2, 1)), "decode")

    assert "first prompt p0 step 2 in repeat 2 in layer model.norm" in found.message


def test_a_phase_is_judged_by_itself() -> None:
    """Noise in decode is none in prefill."""
    whole = differing(sample(), 1, "decode", (0, 0))

    assert Verdict.BIT_EXACT is judged(whole, "prefill").verdict
    assert judged(whole, "prefill").figures["hidden_states.sha256"] != judged(whole, "decode").figures["hidden_states.sha256"]


def test_noise_that_logits_do_not_show_is_noise() -> None:
    """Rounding may hide it; that is said, and nobody has declared it."""
    hidden_only = judged(differing(sample(), 0, "decode", (1, 1)), "decode")
    both = judged(differing(sample(), 0, "decode", (1, 1), (-1, 1)), "decode")

    assert not hidden_only.expected
    assert "the logits of the same requests are equal" in hidden_only.message
    assert ("equal", "differ") == (hidden_only.figures["hidden_states.logits"], both.figures["hidden_states.logits"])
    assert "are equal" not in both.message


def test_logits_alone_point_behind_the_last_norm() -> None:
    """No layer differs: the LM head, or what is done to logits."""
    found = judged(differing(sample(), 0, "decode", (-1, 1)), "decode")

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert (
        "logits of the same requests differ, first prompt p0 step 2 in repeat 2: the difference comes from behind model.norm"
        in found.message
    )
    assert "logits" == found.figures["hidden_states.first_layer"]


@pytest.mark.parametrize(
    ("outcome", "noisy", "expected"),
    [("noisy", True, False), ("noisy", False, False), ("may_be_noisy", True, True), ("may_be_noisy", False, True)],
)
def test_declared_noise(outcome: str, noisy: bool, expected: bool) -> None:
    """`noisy` is satisfied by the divergence that is raised, and by nothing else."""
    found = judged(differing(sample(), 0, "decode", (1, 1)) if noisy else sample(), "decode", outcome=outcome)

    assert (expected, noisy or True) == (found.expected, found.declared)
    assert (Verdict.NOISY if noisy else Verdict.BIT_EXACT) is found.verdict


def test_noise_beyond_the_declared_rows_is_not_excused() -> None:
    """A longer prompt has to be exact."""
    rows = {"outcome": "may_be_noisy", "max_rows": 8}
    short, long = (judged(differing(sample(), p, "prefill", (1, 1)), "prefill", **rows) for p in (0, 1))

    assert (True, False, False) == (short.expected, long.expected, long.declared)
    assert "noise beyond the declared rows (up to 8), in prompt p1" in long.message


def test_lifetimes_add_up() -> None:
    """Each is compared within itself."""
    one, other = sample(), differing(sample(), 0, "decode", (0, 0))
    found = hidden_states.repeat([one, other], "decode", Expectations(()))

    assert (Verdict.NOISY, 6, 2) == (found.verdict, found.figures["runs"], found.figures["lifetimes"])
    assert "1 of 6 repeats differ" in found.message


def test_without_hidden_states_nothing_is_said() -> None:
    """UNAVAILABLE where none were taken, INVALID with the reason where they could not be."""
    none = hidden_states.repeat([observation()], "decode", Expectations(()))
    whole = sample()
    assert whole.hidden is not None
    bad = whole.hidden.header.model_copy(update={"problem": "lost a row"})
    broken = judged(dataclasses.replace(whole, hidden=dataclasses.replace(whole.hidden, header=bad)), "decode")

    assert (Verdict.UNAVAILABLE, Verdict.INVALID) == (none.verdict, broken.verdict)
    assert "lost a row" in broken.message
