"""TODO"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging import refusal
from quantdet.judging import repeat as judgements
from quantdet.judging.distinct import distinctness
from quantdet.judging.restart import restart
from quantdet.judging.verdicts import Divergence, Judgement, Verdict, Violation
from quantdet.matrix.cell import PHASES, Phase
from quantdet.matrix.expectations import Expectations
from quantdet.observations.header import Divergence as Difference
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation
from selftest.fakes.judged import CELL, NOTHING, expecting, flipped, one_flip, row
from selftest.fakes.observation import changed_output, last_repeat, observation, with_outputs
from selftest.judging.test_kernel import kernel


def repeat(whole: Observation, phase: Phase, expectations: Expectations = NOTHING) -> Judgement:
    return judgements.repeat([whole], phase, expectations)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("repeats", [2, 3, 20])
def test_equal_repeats_are_bit_exact_with_n_and_bound(phase: Phase, repeats: int) -> None:
    """0 of n: BIT_EXACT, expected, with n and the upper bound 1 - 0.05^(1/n)."""
    found = repeat(observation(repeats=repeats), phase)

    bound = 1 - 0.05 ** (1 / repeats)
    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    text = f"BIT_EXACT alpha/bf16/cpu-here {phase}: 0 of {repeats} repeats differ, flip rate < {bound:.3g} per call at 95 %"
    assert text == found.message
    assert (repeats, 1, 1, "") == tuple(
        found.figures[name] for name in ("runs", "lifetimes", "distinct_outputs", "first_divergence")
    )
    assert bound == pytest.approx(found.figures["flip_rate_upper95"], abs=1e-6)
    assert observation().logits_sha256(phase) == found.figures["logits.sha256"]
    found.enforce()


def test_lifetimes_add_up() -> None:
    """n counts the calls of all lifetimes; each lifetime is compared with itself, not with the others."""
    found = judgements.repeat([observation(), observation(numerics="other", lifetime=1)], "decode", NOTHING)

    assert (Verdict.BIT_EXACT, 6, 2) == (found.verdict, found.figures["runs"], found.figures["lifetimes"])
    assert 1 - 0.05 ** (1 / 2) == pytest.approx(found.figures["flip_rate_upper95.lifetime"], abs=1e-6)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), phase=st.sampled_from(PHASES), byte=st.integers(0, 31), bit=st.integers(0, 7))
def test_any_changed_bit_of_any_digest_is_found_where_it_is(data: st.DataObject, phase: Phase, byte: int, bit: int) -> None:
    """One bit of one digest of one repeat: NOISY, at exactly that prompt, phase and position; the other phase is not."""
    whole = observation()
    prompt = data.draw(st.integers(0, 1))
    rows = len(whole.prompts[prompt].outputs[0].block(phase).digests)
    position = data.draw(st.integers(0, rows - 1))
    other: Phase = "prefill" if phase == "decode" else "decode"
    changed = one_flip(whole, prompt, phase, position, byte, bit)

    found = repeat(changed, phase)

    word = "step" if phase == "decode" else "position"
    assert Verdict.NOISY == found.verdict
    assert f"prompt p{prompt} {word} {position} in repeat 2" == found.figures["first_divergence"]
    assert "1 of 3 repeats differ" in found.message
    assert 2 == found.figures["distinct_outputs"]
    assert Verdict.BIT_EXACT == repeat(changed, other).verdict
    with pytest.raises(Divergence, match="NOISY alpha/bf16/cpu-here"):
        found.enforce()


def test_what_the_engine_saw_of_a_flip_is_told() -> None:
    """ULP, size, number of logits and the margin of the position are in the sentence."""
    seen = Difference(prompt="p1", phase="decode", repeat=2, position=3, differing=1, token=7, max_abs=2.4e-7, ulp=1)
    whole = one_flip(observation(), 1, "decode", 3)
    whole = Observation(whole.header.model_copy(update={"divergences": (seen,)}), whole.prompts)

    found = repeat(whole, "decode")

    logprobs = whole.prompts[1].outputs[0].decode.topk_logprobs[3]
    margin = float(logprobs[0] - logprobs[1])
    words = f"(token 7: 1 ulp of float32, |d| 2.4e-07; 1 logits differ; top-1/top-2 margin {margin:.3g} nats)"
    assert words in found.message
    assert 2.4e-7 == found.figures["max_abs_diff"]


def test_swapped_steps_are_found_at_the_first() -> None:
    """Two decode steps in another order: NOISY at the first of them."""
    whole = observation()

    def swap(array: Any) -> None:
        array[[1, 3]] = array[[3, 1]]

    names = ("digests", "chosen", "topk_ids", "topk_logprobs", "output_ids")
    output = changed_output(whole.prompts[0].outputs[0], "decode", **dict.fromkeys(names, swap))

    found = repeat(last_repeat(whole, 0, output), "decode")

    assert (Verdict.NOISY, "prompt p0 step 1 in repeat 2") == (found.verdict, found.figures["first_divergence"])
    assert found.figures["l2"] > 0


def test_a_token_alone_is_found() -> None:
    """Equal logits and another token (a sampler that is not deterministic) are NOISY in decode."""
    whole = observation()

    def other(ids: Any) -> None:
        ids[2] += 1

    changed = last_repeat(whole, 1, changed_output(whole.prompts[1].outputs[0], "decode", output_ids=other))

    found = repeat(changed, "decode")
    assert (Verdict.NOISY, "prompt p1 step 2 in repeat 2") == (found.verdict, found.figures["first_divergence"])
    assert Verdict.BIT_EXACT == repeat(changed, "prefill").verdict


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["chosen", "topk_logprobs", "topk_ids"])
def test_an_answer_alone_is_found(phase: Phase, name: str) -> None:
    """Equal logits and another reported logprob or id (a log-softmax that is not deterministic) are NOISY."""
    whole = observation()

    def edit(array: Any) -> None:
        array.view(np.int32).reshape(len(array), -1)[2, -1] ^= 1

    found = repeat(last_repeat(whole, 0, changed_output(whole.prompts[0].outputs[0], phase, **{name: edit})), phase)

    assert Verdict.NOISY == found.verdict
    assert str(found.figures["first_divergence"]).startswith("prompt p0 ")
    assert " 2 in repeat 2" in str(found.figures["first_divergence"])


def test_minus_zero_is_not_zero() -> None:
    """A logprob of -0.0 where the others have 0.0 is another result: bits are compared, not values."""
    whole = observation()

    def zero(array: Any) -> None:
        array[0] = 0.0

    def minus_zero(array: Any) -> None:
        array[0] = -0.0

    first = whole.prompts[0].outputs[0]
    base = with_outputs(whole, 0, (changed_output(first, "decode", chosen=zero),), (0, 0, 0))

    found = repeat(last_repeat(base, 0, changed_output(first, "decode", chosen=minus_zero)), "decode")

    assert (Verdict.NOISY, "prompt p0 step 0 in repeat 2") == (found.verdict, found.figures["first_divergence"])


def test_the_first_divergence_is_the_first_in_reading_order() -> None:
    """Of several differing prompts and repeats the earliest prompt, then position, then repeat is named."""
    whole = observation(repeats=4)
    first = whole.prompts[1].outputs[0]
    outputs = (
        first,
        changed_output(first, "decode", digests=flipped(3)),
        changed_output(first, "decode", digests=flipped(1)),
    )

    found = repeat(with_outputs(whole, 1, outputs, (0, 1, 0, 2)), "decode")

    assert "prompt p1 step 1 in repeat 3" == found.figures["first_divergence"]
    assert 3 == found.figures["distinct_outputs"]
    assert "2 of 4 repeats differ" in found.message


def test_flips_are_counted_against_the_commonest_answer() -> None:
    """If repeat 0 is the odd one, one repeat differs, not all the others; the bound is Clopper-Pearson's for 1 of 5."""
    whole = observation(repeats=5)
    first = whole.prompts[0].outputs[0]
    outputs = (first, changed_output(first, "prefill", digests=flipped(0)))

    found = repeat(with_outputs(whole, 0, outputs, (0, 1, 1, 1, 1)), "prefill")

    assert "1 of 5 repeats differ" in found.message
    assert 0.657408 == pytest.approx(found.figures["flip_rate_upper95"], abs=1e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_nan_is_invalid_in_its_phase(phase: Phase) -> None:
    """A non-finite logit makes its phase INVALID, whatever the repeats say, and leaves the other phase alone."""
    bad = NonFinite(prompt="p1", phase=phase, repeat=1, position=2)
    whole = observation(nonfinite=(bad,))
    other: Phase = "prefill" if phase == "decode" else "decode"

    found = repeat(whole, phase)

    word = "step" if phase == "decode" else "position"
    text = f"INVALID alpha/bf16/cpu-here {phase}: non-finite logits, first prompt p1 {word} 2 in repeat 1"
    assert (Verdict.INVALID, text, False) == (found.verdict, found.message, found.expected)
    assert Verdict.BIT_EXACT == repeat(whole, other).verdict
    with pytest.raises(Violation):
        repeat(whole, phase, expecting("noisy")).enforce()


@pytest.mark.parametrize(
    ("outcome", "noisy", "expected"),
    [("may_be_noisy", True, True), ("may_be_noisy", False, True), ("noisy", False, False), ("noisy", True, False)],
)
def test_declared_noise(outcome: str, noisy: bool, expected: bool) -> None:
    """`may_be_noisy` is content with both; `noisy` with Divergence alone, so that a strict xfail can ask for it."""
    whole = one_flip(observation(), 0, "decode", 1) if noisy else observation()

    found = repeat(whole, "decode", expecting(outcome))

    assert expected == found.expected
    assert f"{outcome}: because [here]" == found.figures["expectation"]
    if not expected:
        with pytest.raises(Divergence if noisy else Violation):
            found.enforce()


def test_noise_declared_for_one_phase_excuses_no_other() -> None:
    """A row for decode says nothing of prefill, nor of another cell."""
    whole = one_flip(observation(), 0, "prefill", 1)

    assert not repeat(whole, "prefill", expecting("may_be_noisy", phase="decode")).expected
    assert not repeat(whole, "prefill", expecting("may_be_noisy", format="gptq")).expected
    assert repeat(whole, "prefill", expecting("may_be_noisy", phase="prefill", format="bf*")).expected


@pytest.mark.parametrize("outcome", ["noisy", "may_be_noisy"])
def test_noise_beyond_the_declared_rows_is_not_the_declared_noise(outcome: str) -> None:
    """A prompt with more rows than `max_rows` has to be exact in prefill; one with as many, and decode, may be noisy."""
    expectations = row({"when": {}, "outcome": outcome, "max_rows": 6})

    within = repeat(one_flip(observation(lengths=(6, 9)), 0, "prefill", 1), "prefill", expectations)
    beyond = repeat(one_flip(observation(lengths=(6, 9)), 1, "prefill", 1), "prefill", expectations)
    decode = repeat(one_flip(observation(lengths=(6, 9)), 1, "decode", 1), "decode", expectations)

    assert outcome == "noisy" or (within.expected and decode.expected)
    assert (Verdict.NOISY, False) == (beyond.verdict, beyond.expected)
    assert "noise beyond the declared rows (up to 6), in prompt p1" in beyond.message
    with pytest.raises(Violation):
        beyond.enforce()


def test_noise_below_the_declared_rows_is_not_the_declared_noise() -> None:
    """A prompt with fewer rows than `min_rows` has to be exact, in decode too: its first step comes out of the same pass."""
    expectations = row({"when": {}, "outcome": "may_be_noisy", "min_rows": 9})

    for phase in PHASES:
        enough = repeat(one_flip(observation(lengths=(6, 9)), 1, phase, 1), phase, expectations)
        short = repeat(one_flip(observation(lengths=(6, 9)), 0, phase, 1), phase, expectations)

        assert (True, False) == (enough.expected, short.expected)
        assert "noise beyond the declared rows (from 9 on), in prompt p0" in short.message


def test_every_message_is_one_line_that_starts_with_its_verdict() -> None:
    """Most readers show the first line only."""
    noisy = one_flip(observation(), 0, "decode", 1)
    found = [
        repeat(observation(), "decode"), repeat(noisy, "decode"), kernel("K"), kernel("Other"),
        restart([observation(), observation()], NOTHING), refusal.refusal(CELL, "no", NOTHING),
        distinctness(observation(), {CELL: observation("gptq")}, NOTHING),
    ]  # fmt: skip

    for one in found:
        assert one.message.startswith(f"{one.verdict} alpha/bf16/cpu-here")
        assert "\n" not in one.message
        assert one.text.startswith(one.message)
