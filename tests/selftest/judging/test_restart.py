"""Engine lifetimes of one cell against each other."""

import pytest

from quantdet.judging.restart import restart
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation
from selftest.fakes.judged import NOTHING, expecting, flipped, row
from selftest.fakes.observation import changed_output, observation, with_outputs


def test_equal_lifetimes() -> None:
    """Lifetimes with the same bits are BIT_EXACT, with the bound for their number."""
    found = restart([observation(lifetime=n) for n in range(3)], NOTHING)

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert "0 of 3 lifetimes differ, flip rate < 0.632 per lifetime at 95 %" in found.message


@pytest.mark.parametrize("phase", PHASES)
def test_a_lifetime_that_differs_in_one_bit(phase: Phase) -> None:
    """One bit of one position of one lifetime: NOISY."""
    whole = observation()
    output = changed_output(whole.prompts[1].outputs[0], phase, digests=flipped(3, 31, 7))

    found = restart([whole, whole, with_outputs(whole, 1, (output,), (0, 0, 0))], NOTHING)

    assert (Verdict.NOISY, False, 2) == (found.verdict, found.expected, found.figures["distinct_outputs"])
    assert "1 of 3 lifetimes differ" in found.message


def test_one_lifetime_says_nothing_of_others() -> None:
    """BIT_EXACT over one of one would be a pass for nothing."""
    found = restart([observation()], NOTHING)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "needs 2 lifetimes, have 1" in found.message


def test_lifetimes_without_numbers_are_not_compared() -> None:
    """Equal NaN are no equal logits."""
    bad = NonFinite(prompt="p0", phase="decode", repeat=0, position=0)
    lifetimes = [observation(nonfinite=(bad,), lifetime=n) for n in range(2)]

    assert (Verdict.INVALID, False) == ((found := restart(lifetimes, NOTHING)).verdict, found.expected)


def lifetimes(*edits: tuple[int, Phase] | None, caches: str = "warm") -> list[Observation]:
    """A lifetime, and one per edit: other logits in every repeat of this prompt and phase; the last one's caches."""
    found = [observation()]
    for number, edit in enumerate(edits, 1):
        one = observation(lifetime=number, caches=caches if number == len(edits) else "warm")
        if edit is not None:
            prompt, phase = edit
            output = changed_output(one.prompts[prompt].outputs[0], phase, digests=flipped(3))
            one = with_outputs(one, prompt, (output,), (0, 0, 0))
        found.append(one)
    return found


@pytest.mark.parametrize("outcome", ["noisy", "may_be_noisy"])
@pytest.mark.parametrize("phase", PHASES)
def test_noise_of_one_phase_excuses_no_other_between_lifetimes(outcome: str, phase: Phase) -> None:
    """Declared for decode, a difference of decode is expected and one of prefill is not; and the other way round."""
    other: Phase = "prefill" if phase == "decode" else "decode"
    declared = expecting(outcome, phase=phase)

    own = restart(lifetimes((1, phase)), declared)
    both = restart(lifetimes((1, phase), (0, other)), declared)

    assert (Verdict.NOISY, True) == (own.verdict, own.expected)
    assert f"{outcome}: because [here]" == own.figures["expectation"]
    assert (Verdict.NOISY, False) == (both.verdict, both.expected)
    word = "step" if other == "decode" else "position"
    assert "2 of 3 lifetimes differ" in both.message
    assert f"lifetime 2 differs from the first at prompt p0 {other} {word} 3" in both.message  # not the excused one
    assert f"prompt p0 {other} {word} 3" == both.figures["first_divergence"]


def test_lifetimes_may_differ_up_to_the_declared_rows() -> None:
    """Prefill of a prompt with more rows than the noise has to be the same in every lifetime; decode is one row."""
    declared = row({"when": {}, "outcome": "may_be_noisy", "max_rows": 6})

    assert restart(lifetimes((0, "prefill")), declared).expected
    assert restart(lifetimes((1, "decode")), declared).expected
    beyond = restart(lifetimes((0, "prefill"), (1, "prefill")), declared)

    assert not beyond.expected
    assert "lifetime 2 differs from the first at prompt p1 prefill position 3" in beyond.message


def test_lifetimes_that_may_recompile_may_differ() -> None:
    """The row excuses any lifetime, warm or cold, in both phases; without it none is."""
    declared = row({"when": {}, "outcome": "may_recompile", "max_l2": 0.1})
    for phase in PHASES:
        cold = restart(lifetimes(None, (1, phase), caches="cold"), declared)
        warm = restart(lifetimes((1, phase), None), declared)

        assert (Verdict.NOISY, True, ["as found", "as found", "cold"]) == (cold.verdict, cold.expected, cold.figures["caches"])
        assert "1 of 3 lifetimes differ" in cold.message and "; the last one with cold caches; lifetime 2 " in cold.message
        assert "may_recompile: because [here]" == cold.figures["expectation"]
        assert warm.expected and "cold caches" not in warm.message
        assert not restart(lifetimes((1, phase), caches="cold"), NOTHING).expected


def test_lifetimes_that_may_recompile_may_differ_so_much() -> None:
    """Farther apart than declared is another thing: other weights, or another kernel. Distances are in the figures."""
    whole = observation()
    output = changed_output(whole.prompts[0].outputs[0], "prefill", digests=flipped(1), topk_logprobs=lambda a: a.__isub__(0.2))
    other = with_outputs(observation(lifetime=1), 0, (output,), (0, 0, 0))
    allowed = [row({"when": {}, "outcome": "may_recompile", "max_l2": most}) for most in (0.05, 5.0)]

    far, near = (restart([whole, other], one) for one in allowed)

    assert (False, True) == (far.expected, near.expected)
    assert far.figures["max_abs_diff"] == pytest.approx(0.2, rel=1e-3)
    assert "nats, declared are at most 0.05" in far.message and "declared are" not in near.message
