"""A format against every other one of its model."""

from typing import Any

import numpy as np
import pytest

from quantdet.judging.distinct import distinctness
from quantdet.judging.verdicts import Verdict, Violation
from quantdet.matrix.expectations import Expectations
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation
from selftest.fakes.observation import changed_output, observation, with_outputs
from selftest.judging.test_pairs import BF16, CT, GPTQ, OTHER_NUMBERS, judge, noisy, nudged, twins, with_header


def test_distinct_from_all() -> None:
    """DISTINCT from every peer, and the closest is named."""
    found = judge(BF16, GPTQ, observation("awq"))

    assert (Verdict.DISTINCT, True, 2) == (found.verdict, found.expected, found.figures["pairs"])
    assert "DISTINCT from 2 of 2 formats; closest " in found.message
    closest = min(found.pairs, key=lambda one: one.l2)
    assert closest.b == found.figures["closest"]
    assert ("distinct", []) == (found.figures["expectation"], found.figures["identical_to"])


@pytest.mark.parametrize(("own", "peer"), [(GPTQ, CT), (CT, GPTQ)])
def test_the_same_numerics_are_identical_without_a_row(own: Observation, peer: Observation) -> None:
    """The same numbers on the same kernels: IDENTICAL is expected, from either side, and the reason is told."""
    found = judge(own, peer, BF16)

    assert (Verdict.IDENTICAL, True) == (found.verdict, found.expected)
    told = str(found.figures["expectation"])
    assert told.startswith(f"identical to {peer.header.format} (the same numbers (") and "Unquantized" in told


@pytest.mark.parametrize(("own", "peer"), [(GPTQ, CT), (CT, GPTQ)])
def test_strangers_that_agree_fail(own: Observation, peer: Observation) -> None:
    """IDENTICAL logits of other numbers are a violation, from either side: one of the two is not what it seems."""
    peer = with_header(peer, numbers=OTHER_NUMBERS)
    found = judge(own, peer, BF16)

    assert (Verdict.IDENTICAL, False) == (found.verdict, found.expected)
    assert f"IDENTICAL to {peer.header.format}, expected DISTINCT" in found.message
    assert "other numbers (" in found.message
    with pytest.raises(Violation):
        found.enforce()


def test_the_same_numerics_that_differ_fail() -> None:
    """One bit between formats of the same numbers on the same kernels."""
    found = judge(GPTQ, nudged(GPTQ, "ct", "prefill", 1, 2))

    assert (Verdict.DISTINCT, False) == (found.verdict, found.expected)
    assert "DISTINCT from ct, expected IDENTICAL" in found.message and "the same numbers" in found.message


@pytest.mark.parametrize("verdict", [Verdict.IDENTICAL, Verdict.DISTINCT])
def test_unknown_numbers_ask_for_nothing(verdict: Verdict) -> None:
    """Where it is not known which numbers a format holds, and all else is the same, either verdict passes, and that is said."""
    peer = CT if verdict is Verdict.IDENTICAL else nudged(GPTQ, "ct", "prefill", 1, 2)
    found = judge(GPTQ, with_header(peer, numbers="", checkpoint_sha256="9" * 64))

    assert (verdict, True) == (found.verdict, found.expected)
    assert "it is not known which numbers ct holds" in str(found.figures["expectation"])


def test_words_of_the_matrix_make_strangers_but_no_twins() -> None:
    """Numbers that nobody told: other words are other numbers, so that equal logits fail; one word proves nothing."""
    own, silent = (with_header(one, checkpoint_source="synthetic qwen3, seed 0") for one in (GPTQ, CT))
    silent = with_header(silent, numbers="", checkpoint_sha256="9" * 64)
    words = {"gptq": "int4-sym/none", "ct": "int4-asym/none"}

    strangers = judge(own, silent, expectations=Expectations((), words=words))
    assert (Verdict.IDENTICAL, False) == (strangers.verdict, strangers.expected)
    assert "other numbers by the matrix (int4-sym/none against int4-asym/none)" in strangers.message
    alike = judge(own, silent, expectations=Expectations((), words=dict.fromkeys(words, "int4-sym/none")))
    assert alike.expected and "either verdict passes against ct: the same kernels" in alike.message


@pytest.mark.parametrize("source", ["hub maker/x@0123", "folder /weights", ""])
def test_words_say_nothing_of_somebody_elses_checkpoint(source: str) -> None:
    """A row may call it what it is not: only what this suite made holds what its words say."""
    own, silent = (with_header(one, checkpoint_source=source) for one in (GPTQ, CT))
    silent = with_header(silent, numbers="", checkpoint_sha256="9" * 64)
    words = {"gptq": "int4-sym/none", "ct": "int4-asym/none"}

    assert judge(own, silent, expectations=Expectations((), words=words)).expected


@pytest.mark.parametrize("verdict", [Verdict.IDENTICAL, Verdict.DISTINCT])
def test_false_red_online_fp8_against_the_fp8_checkpoint(verdict: Verdict) -> None:
    """Made while loading of the same base, it may be the same or not: either verdict passes, whatever the rows call them."""
    online = CT if verdict is Verdict.IDENTICAL else nudged(GPTQ, "ct", "prefill", 1, 2)
    own, online = (with_header(one, checkpoint_source="synthetic qwen3, seed 0") for one in (GPTQ, online))
    online = with_header(online, numbers=f"online:{'4' * 64}", checkpoint_sha256="9" * 64)
    words = {"gptq": "fp8-channel/fp8", "ct": "bf16/none"}

    found = judge(own, online, expectations=Expectations((), words=words))

    assert (verdict, True) == (found.verdict, found.expected)
    assert "either verdict passes against ct" in found.message


@pytest.mark.parametrize("verdict", [Verdict.IDENTICAL, Verdict.DISTINCT])
@pytest.mark.parametrize("numbers", [f"bytes:{'4' * 64}", OTHER_NUMBERS])
def test_false_red_two_makers_of_one_base(verdict: Verdict, numbers: str) -> None:
    """One word for both in the matrix, other tensors: DISTINCT is right, and where one is not decoded so is IDENTICAL."""
    other = CT if verdict is Verdict.IDENTICAL else nudged(GPTQ, "ct", "prefill", 1, 2)
    other = with_header(other, numbers=numbers, checkpoint_sha256="9" * 64)
    words = dict.fromkeys(("gptq", "ct"), "int4-sym/none")

    found = judge(GPTQ, other, expectations=Expectations((), words=words))

    assert found.expected is (verdict is Verdict.DISTINCT or numbers != OTHER_NUMBERS)


def test_a_declared_surprise_is_a_departure() -> None:
    """`distinct_from`: the same numerics by all that is seen, and other logits for a reason that is declared."""
    declared = twins("ct", outcome="distinct_from")

    assert judge(GPTQ, nudged(GPTQ, "ct", "prefill", 1, 2), expectations=declared).expected
    assert not judge(GPTQ, CT, expectations=declared).expected


@pytest.mark.parametrize(("own", "peer"), [(GPTQ, CT), (CT, GPTQ)])
def test_declared_twins_pass(own: Observation, peer: Observation) -> None:
    """A row declares a pair, whichever of the two it is written for, though their numbers are others."""
    own, peer = (with_header(one, numbers=OTHER_NUMBERS) if one is CT else one for one in (own, peer))
    found = judge(own, peer, BF16, expectations=twins("ct"))

    assert (Verdict.IDENTICAL, True) == (found.verdict, found.expected)
    assert f"DISTINCT from 1 of 2 formats, IDENTICAL to {peer.header.format}" in found.message
    assert [peer.header.format] == found.figures["identical_to"]
    assert f"identical_to: {peer.header.format} (same)" == found.figures["expectation"]


def test_a_format_no_farther_than_its_own_lifetimes_is_not_told_apart() -> None:
    """Engine processes of either format that differ as much: INDISTINCT, which nobody declared."""
    own, peer = observation("bf16"), observation("gptq")
    apart = distinctness(own, {peer.header.cell: peer}, Expectations(()))

    for cell in (own.header.cell, peer.header.cell):
        near, far = (
            distinctness(own, {peer.header.cell: peer}, Expectations(()), spreads={cell: spread}) for spread in (100.0, 1e-6)
        )
        assert (Verdict.INDISTINCT, False) == (near.verdict, near.expected)
        assert (Verdict.DISTINCT, True) == (far.verdict, far.expected) == (apart.verdict, apart.expected)


def test_declared_twins_that_differ_fail() -> None:
    """One bit between declared twins breaks the declaration."""
    found = judge(GPTQ, nudged(GPTQ, "ct", "prefill", 1, 2), expectations=twins("ct"))

    assert (Verdict.DISTINCT, False) == (found.verdict, found.expected)
    assert "DISTINCT from ct, expected IDENTICAL" in found.message
    assert "1/13 positions differ" in found.message


def test_twins_by_their_kernel_are_twins_where_it_ran() -> None:
    """`same_kernel`: where another kernel ran, equal logits are not what was declared, and other logits are right."""
    declared = twins("ct", same_kernel=True)
    marlin, machete = (observation("ct", numerics="int4", kernels=(name,)) for name in ("Marlin", "Machete"))
    own = observation("gptq", numerics="int4", kernels=("Marlin",))

    assert judge(own, marlin, expectations=declared).expected
    assert not judge(own, machete, expectations=declared).expected
    other = observation("ct", kernels=("Machete",))
    assert judge(own, other, expectations=declared).expected


def test_an_indistinct_pair_fails() -> None:
    """A format lost in its own noise cannot be told apart: not what the default expects."""
    found = judge(noisy(GPTQ, 50.0), BF16)

    assert (Verdict.INDISTINCT, False) == (found.verdict, found.expected)


def test_every_wrong_pair_is_told() -> None:
    """The message has the first, the detail the others."""
    found = judge(observation("a", numerics="int4", numbers=OTHER_NUMBERS), GPTQ, CT)

    assert "IDENTICAL to gptq, expected DISTINCT" in found.message
    assert ["IDENTICAL to ct"] == [line.partition(",")[0] for line in found.detail.splitlines()]


def test_nan_is_invalid_for_the_cell_and_named_for_its_peers() -> None:
    """A cell with NaN has no distances: INVALID, not an exception, for itself and against it."""

    def nan(array: Any) -> None:
        array[2, 0] = np.nan

    output = changed_output(GPTQ.prompts[0].outputs[0], "prefill", topk_logprobs=nan)
    broken = with_outputs(GPTQ, 0, (output,), (0, 0, 0))
    bad = NonFinite(prompt="p0", phase="prefill", repeat=0, position=2)
    broken = Observation(broken.header.model_copy(update={"nonfinite": (bad,)}), broken.prompts)

    assert Verdict.INVALID == judge(broken, BF16).verdict
    assert "non-finite" in judge(broken, BF16).message
    assert "gptq" in judge(BF16, broken).message


def test_logits_that_are_no_numbers_are_invalid_though_no_logprob_shows_it() -> None:
    """A logit of -inf leaves every reported logprob finite: INVALID for the cell, no peer for the others."""
    bad = NonFinite(prompt="p1", phase="decode", repeat=0, position=2)
    silent = Observation(GPTQ.header.model_copy(update={"nonfinite": (bad,)}), GPTQ.prompts)

    own, others = judge(silent, BF16), judge(BF16, silent, CT)

    assert (Verdict.INVALID, False) == (own.verdict, own.expected)
    assert "non-finite logits, first prompt p1 decode step 2" in own.message
    assert (Verdict.DISTINCT, ["ct"]) == (others.verdict, [one.b for one in others.pairs])
    assert "not compared, non-finite logits: gptq" in others.message
