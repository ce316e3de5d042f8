"""Verdicts on seeded defects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from quantdet.judging import controls as control_judgements
from quantdet.judging.verdicts import Judgement, Verdict, Violation
from quantdet.matrix.cell import PHASES, Phase
from quantdet.observations.header import Divergence as Difference
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation
from selftest.fakes.judged import flipped, one_flip
from selftest.fakes.observation import changed_output, last_repeat, observation, with_outputs


def control(*, rows: dict[Phase, Sequence[int]], **seen: Any) -> Observation:
    """The bit-flip control of `fakes.observation`: digests of these rows of the first prompt differ in the last repeat.

    `seen`: what the engine notes of it otherwise than it was seeded.
    """
    whole = observation(role="control", inject="control")
    output = whole.prompts[0].outputs[0]
    noted = []
    for phase, positions in rows.items():
        for position in positions:
            output = changed_output(output, phase, digests=flipped(position))
        first = {"position": min(positions), "repeat": 2, "differing": 1, "token": 0, "max_abs": 1e-7, "ulp": 1}
        noted.append(Difference.model_validate({"prompt": "p0", "phase": phase, **first, **seen}))
    whole = last_repeat(whole, 0, output) if rows else whole
    return replace(whole, header=whole.header.model_copy(update={"divergences": tuple(noted)}))


def test_a_bit_that_is_found_in_each_phase_is_a_control() -> None:
    """NOISY is what is expected, with the place in either phase."""
    found = control_judgements.bit_flip(control(rows={"decode": [1], "prefill": [1]}))

    assert (Verdict.NOISY, True) == (found.verdict, found.expected)
    text = "one bit turned over in repeat 2 is found in each phase: decode prompt p0 step 1, prefill prompt p0 position 1"
    assert f"NOISY alpha/bf16/cpu-here control: {text}" == found.message
    found.enforce()


@pytest.mark.parametrize("phase", PHASES)
def test_a_bit_that_is_missed_in_one_phase_is_no_control(phase: Phase) -> None:
    """The other phase does not make up for it; the place that it was at is in the message."""
    rows: dict[Phase, list[int]] = {one: [1] for one in PHASES if one != phase}

    found = control_judgements.bit_flip(control(rows=rows))

    word = "step" if phase == "decode" else "position"
    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert f"{phase}: one bit turned over at prompt p0 {word} 1 in repeat 2, found: BIT_EXACT" in found.message
    with pytest.raises(Violation):
        found.enforce()


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        ([2], {}),  # at another place
        ([0, 1], {}),  # and one before it
        ([1, 3], {}),  # and one after it
        ([1], {"token": 1}),
        ([1], {"differing": 2}),
        ([1], {"ulp": 2}),
        ([1], {"repeat": 1}),
    ],
)
@pytest.mark.parametrize("phase", PHASES)
def test_anything_else_than_the_seeded_bit_is_no_control(phase: Phase, rows: list[int], seen: dict[str, int]) -> None:
    """Another place, token or size, and anything beside it: what was found is not what was seeded."""
    both: dict[Phase, Sequence[int]] = {one: rows if one == phase else [1] for one in PHASES}
    whole = control(rows=both)
    noted = [d.model_copy(update=seen) if d.phase == phase else d for d in whole.header.divergences]
    if "repeat" in seen:  # the difference is in the second of three repeats, not in the last
        whole = with_outputs(whole, 0, whole.prompts[0].outputs, (0, 1, 0))
    whole = replace(whole, header=whole.header.model_copy(update={"divergences": tuple(noted)}))

    found = control_judgements.bit_flip(whole)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert phase in found.text


@pytest.mark.parametrize("phase", PHASES)
def test_a_prompt_that_differs_by_itself_is_no_control(phase: Phase) -> None:
    """Though the bit is found where it was turned over, first in reading order."""
    whole = one_flip(control(rows={"decode": [1], "prefill": [1]}), 1, phase, 2)

    found = control_judgements.bit_flip(whole)

    assert Verdict.INVALID is found.verdict
    assert "in 2 outputs" in found.message


def same_weights(own: Observation, renamed: Observation) -> Judgement:
    return control_judgements.same_weights(own, renamed)


def one_integer(own: Observation, other: Observation) -> Judgement:
    return control_judgements.one_integer(own, other)


def differing(phase: Phase, **header: Any) -> Observation:
    """One bit of repeat 0 (and all others) of the second prompt is another."""
    whole = observation(**header)
    return with_outputs(whole, 1, (changed_output(whole.prompts[1].outputs[0], phase, digests=flipped(3)),), (0, 0, 0))


def test_the_same_weights_are_identical() -> None:
    """Of the control only repeat 0 is looked at: the last one has the seeded bit."""
    found = same_weights(observation(), control(rows={"decode": [1], "prefill": [1]}))

    assert (Verdict.IDENTICAL, True) == (found.verdict, found.expected)
    assert "in another process: 21 of 21 positions equal" in found.message  # 2 x 4 steps, 5 and 8 positions


@pytest.mark.parametrize("phase", PHASES)
def test_the_same_weights_with_other_bits_fail(phase: Phase) -> None:
    """One bit of one position, and the message says where."""
    found = same_weights(observation(), differing(phase))

    assert (Verdict.DISTINCT, False) == (found.verdict, found.expected)
    assert f"give other bits at prompt p1 {phase} {'step' if phase == 'decode' else 'position'} 3" in found.message


def test_other_weights_are_not_the_same_weights() -> None:
    """Equal bits or not: the copy was to have the same tensors."""
    found = same_weights(observation(), observation(checkpoint_sha256="9" * 64))

    assert (Verdict.INVALID, False, True) == (found.verdict, found.expected, "the copy has other weights" in found.message)


@pytest.mark.parametrize("phase", PHASES)
def test_one_integer_apart_is_distinct(phase: Phase) -> None:
    """Where it shows first, and in how many positions of the prompts."""
    altered = differing(phase, checkpoint_sha256="9" * 64, checkpoint_source="here: x.qweight")

    found = one_integer(observation(), altered)

    where = f"prompt p1 {phase} {'step' if phase == 'decode' else 'position'} 3"
    assert (Verdict.DISTINCT, True, where) == (found.verdict, found.expected, found.figures["first_divergence"])
    share = "1 of 13" if phase == "prefill" else "0 of 13"
    assert f"one integer of here: x.qweight changed by 1 shows first at {where}, in {share} prefill" in found.message


def test_one_integer_that_no_bit_shows_fails() -> None:
    found = one_integer(observation(), observation(checkpoint_sha256="9" * 64))

    assert (Verdict.IDENTICAL, False) == (found.verdict, found.expected)
    assert "no bit of any logit differs" in found.message


def test_an_integer_that_was_not_changed_is_no_control() -> None:
    """Whatever the bits are: a difference between equal weights is none of the integer's."""
    found = one_integer(observation(), differing("decode"))

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "the altered checkpoint has the same weights" in found.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workload_sha256": "3" * 64}, "workloads differ"),
        ({"decode_tokens": 5}, "run lengths differ"),
        ({"environment": {"vllm": "0.1"}}, "environments differ in vllm"),
        ({"nonfinite": (NonFinite(prompt="p0", phase="decode", repeat=0, position=0),)}, "non-finite logits"),
    ],
)
def test_what_cannot_be_compared_says_nothing_of_the_weights(changes: dict[str, Any], words: str) -> None:
    """A difference of the requests or of the environment is not the integer's; nor is it one of the name."""
    for judge, sha256 in ((same_weights, "1" * 64), (one_integer, "9" * 64)):
        found = judge(observation(), observation(numerics="other", checkpoint_sha256=sha256, **changes))

        assert (Verdict.INVALID, False) == (found.verdict, found.expected)
        assert words in found.message
