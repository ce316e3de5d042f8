"""Pairs of formats on the same forced ids: identical, distinct, or lost in their own noise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging.distinct import distinctness
from quantdet.judging.pairs import pair
from quantdet.judging.verdicts import Judgement, Pair, Verdict
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.observation import Observation
from quantdet.session.session import Session
from selftest.fakes.observation import changed_output, last_repeat, observation, with_outputs

BF16, GPTQ, CT = observation("bf16"), observation("gptq", numerics="int4"), observation("ct", numerics="int4")
OTHER_NUMBERS = f"decoded:{'f' * 64}"


def twins(*formats: str, of: str = "gptq", **more: Any) -> Expectations:
    row: dict[str, Any] = {
        "when": {"format": of}, "outcome": "identical_to", "formats": list(formats), "reason": "same", "source": "here", **more,
    }  # fmt: skip
    return Expectations((Expect.model_validate(row),))


def judge(own: Observation, *peers: Observation, expectations: Expectations | None = None) -> Judgement:
    return distinctness(own, {peer.header.cell: peer for peer in peers}, expectations or Expectations(()))


def noisy(whole: Observation, size: float) -> Observation:
    """`whole` with a last repeat whose prefill logprobs are `size` off in every prompt."""

    def shift(array: Any) -> None:
        array += np.float32(size)

    def digest(array: Any) -> None:
        array ^= 1

    for prompt, record in enumerate(whole.prompts):
        output = changed_output(record.outputs[0], "prefill", topk_logprobs=shift, chosen=shift, digests=digest)
        whole = last_repeat(whole, prompt, output)
    return whole


def with_header(whole: Observation, **changes: Any) -> Observation:
    """`whole` with other fields in its header."""
    return Observation(whole.header.model_copy(update=changes), whole.prompts)


def nudged(whole: Observation, format_id: str, phase: str, prompt: int, position: int, bit: int = 0) -> Observation:
    """`whole` as another format, bit-exact too, with one bit of one digest changed in all repeats."""

    def edit(array: Any) -> None:
        array[position, bit // 8] ^= 1 << (bit % 8)

    output = changed_output(whole.prompts[prompt].outputs[0], phase, digests=edit)
    changed = with_outputs(whole, prompt, (output,), (0,) * whole.header.repeats)
    return Observation(changed.header.model_copy(update={"format": format_id}), changed.prompts)


def test_equal_logits_are_identical() -> None:
    """The same numerics under two names: IDENTICAL, every distance 0."""
    found = pair(GPTQ, CT)

    assert ("gptq", "ct", Verdict.IDENTICAL) == (found.a, found.b, found.verdict)
    assert (0, 5 + 8, 0.0, 0.0, 0.0, 0.0) == (
        found.differing, found.positions, found.l2, found.max_abs, found.decode_l2, found.decode_published,
    )  # fmt: skip
    assert 2 * 4 == found.decode_steps


def test_other_logits_are_distinct() -> None:
    """Other numerics: DISTINCT, with the number of positions and the distances."""
    found = pair(BF16, GPTQ)

    assert Verdict.DISTINCT == found.verdict
    assert (13, 13) == (found.differing, found.positions)
    assert found.l2 > 0
    assert found.max_abs > 0


def test_a_pair_is_the_same_both_ways() -> None:
    """Swapping the formats swaps their names and nothing else."""
    one, other = pair(BF16, GPTQ), pair(GPTQ, BF16)

    assert (one.a, one.b) == (other.b, other.a)
    assert one.l2 == pytest.approx(other.l2)
    assert (one.verdict, one.differing, one.max_abs) == (other.verdict, other.differing, other.max_abs)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["decode", "prefill"]), st.integers(0, 1), st.integers(0, 3), st.integers(0, 255))
def test_one_bit_makes_two_bit_exact_formats_distinct(phase: str, prompt: int, position: int, bit: int) -> None:
    """Whichever bit of whichever digest: full-vocabulary logits decide, not the top-k distance (which is 0 here)."""
    found = pair(GPTQ, nudged(GPTQ, "ct", phase, prompt, position, bit))

    assert Verdict.DISTINCT == found.verdict
    assert (1 if phase == "prefill" else 0) == found.differing
    assert 0.0 == found.l2


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_either_phase_alone_tells_formats_apart(phase: str) -> None:
    """The last position of the last prompt, and nothing else, is enough."""
    assert Verdict.DISTINCT == pair(GPTQ, nudged(GPTQ, "ct", phase, 1, 3)).verdict


@pytest.mark.parametrize(("size", "verdict"), [(1e-3, Verdict.DISTINCT), (50.0, Verdict.INDISTINCT)])
def test_a_noisy_format_is_distinct_above_its_noise_only(size: float, verdict: Verdict) -> None:
    """Between the formats has to be more than within: small noise is DISTINCT, large noise INDISTINCT."""
    one, other = observation("gptq", numerics="int4", repeats=4), observation("bf16", repeats=4)  # with 3, no p is below 0.1
    for found in (pair(noisy(one, size), other), pair(other, noisy(one, size))):
        assert verdict == found.verdict
        assert found.within == pytest.approx(size * 2, rel=0.01)  # L2 over top-k = 4 ids, each `size` off


def test_a_noisy_format_is_never_identical() -> None:
    """Equal numerics of which one is noisy: INDISTINCT, since identity was not seen in every repeat."""
    assert Verdict.INDISTINCT == pair(noisy(GPTQ, 0.1), CT).verdict


def test_decode_noise_alone_does_not_hide_equal_prefill() -> None:
    """A format that is noisy in decode only is compared by its prefill, where it is bit-exact."""

    def edit(array: Any) -> None:
        array[2, 0] ^= 1

    flaky = last_repeat(GPTQ, 0, changed_output(GPTQ.prompts[0].outputs[0], "decode", digests=edit))

    assert Verdict.IDENTICAL == pair(flaky, CT).verdict
    assert Verdict.DISTINCT == pair(flaky, BF16).verdict


def test_decode_that_no_two_repeats_share_is_not_identical() -> None:
    """Equal prefill, and decode noise on one side that never meets the other side's decode: INDISTINCT, either way round."""

    def edit(array: Any) -> None:
        array[2, 0] ^= 1

    flaky = last_repeat(GPTQ, 0, changed_output(GPTQ.prompts[0].outputs[0], "decode", digests=edit))
    apart = nudged(GPTQ, "ct", "decode", 0, 2, bit=77)

    assert [Verdict.INDISTINCT] * 2 == [pair(flaky, apart).verdict, pair(apart, flaky).verdict]


def test_a_pair_is_computed_once_and_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session remembers it for the other format's test: names and directed figures change places."""
    cache: Any = SimpleNamespace(_pairs={})
    directed = {"decode_published": 1.0, "decode_published_back": 2.0, "prefill_published": 3.0, "prefill_published_back": 4.0}
    once = [Pair("bf16", "gptq", Verdict.DISTINCT, l2=5.0, max_abs=6.0, differing=1, positions=2, **directed)]
    monkeypatch.setattr("quantdet.session.session.pair", lambda a, b: once.pop())

    forth, back = Session.compare(cache, BF16, GPTQ), Session.compare(cache, GPTQ, BF16)

    assert ("bf16", "gptq", 1.0, 3.0) == (forth.a, forth.b, forth.decode_published, forth.prefill_published)
    assert ("gptq", "bf16", 2.0, 4.0) == (back.a, back.b, back.decode_published, back.prefill_published)
    assert (1.0, 3.0, 5.0) == (back.decode_published_back, back.prefill_published_back, back.l2)


def test_decode_is_compared_while_the_context_is_common() -> None:
    """From the step after another token the contexts differ; the published distance is inf from there on."""
    found = pair(BF16, GPTQ)

    common = []
    for a, b in zip(BF16.prompts, GPTQ.prompts, strict=True):
        differs = a.run(0).output_ids != b.run(0).output_ids
        common.append(int(differs.argmax()) + 1 if differs.any() else len(differs))
    assert sum(common) == found.decode_steps
    assert float("inf") == found.decode_published
