"""Judgements on hand-made observations: what differs is found where it is, and nothing else is said."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging import kernel as judging_kernel
from quantdet.judging import refusal
from quantdet.judging import repeat as judgements
from quantdet.judging.differences import has_to_be_exact
from quantdet.judging.verdicts import Divergence, Judgement, Verdict, Violation
from quantdet.matrix.cell import PHASES, Cell, Phase
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.header import Divergence as Difference
from quantdet.observations.header import Executed, Layer, NonFinite
from quantdet.observations.observation import Observation
from selftest.fakes import changed_output, last_repeat, observation, with_outputs

NOTHING = Expectations(())
CELL = Cell("alpha", "bf16", "cpu-here")


def expecting(outcome: str, **when: str) -> Expectations:
    return row({"when": when, "outcome": outcome})


def row(fields: dict[str, Any]) -> Expectations:
    return Expectations((Expect.model_validate({"reason": "because", "source": "here", **fields}),))


def flipped(position: int, byte: int = 0, bit: int = 0) -> Callable[[Any], None]:
    """One bit of one position's digest: what one flipped bit of one logit does to it, at the least."""

    def edit(array: Any) -> None:
        array[position, byte] ^= 1 << bit

    return edit


def one_flip(whole: Observation, prompt: int, phase: Phase, position: int, byte: int = 0, bit: int = 0) -> Observation:
    output = changed_output(whole.prompts[prompt].outputs[0], phase, digests=flipped(position, byte, bit))
    return last_repeat(whole, prompt, output)


def repeat(whole: Observation, phase: Phase, expectations: Expectations = NOTHING) -> Judgement:
    return judgements.repeat([whole], phase, expectations)


# --------------------------------------------------------------------------------------------------------------- repeat


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


# --------------------------------------------------------------------------------------------------------------- kernel


def kernel(*names: str, classes: tuple[str, ...] = ("K",), quantized: bool = True) -> Judgement:
    return judging_kernel.kernel(observation(kernels=names), "fast", classes, "all" if quantized else "")


def test_the_requested_kernel_is_confirmed() -> None:
    """Every linear layer shows one of the requested classes."""
    found = kernel("K", classes=("J", "K"))

    assert (Verdict.CONFIRMED, True) == (found.verdict, found.expected)
    assert "CONFIRMED alpha/bf16/cpu-here kernel: K x4 (requested fast)" == found.message
    assert ("fast", "K x4") == (found.figures["kernel.requested"], found.figures["kernel.executed"])


@pytest.mark.parametrize(
    ("names", "classes", "quantized", "words"),
    [
        (("Other",), ("K",), True, "requested fast (K), executed Other x4"),
        (("K", "Other"), ("K", "Other"), True, "mixed kernels: K x4 + Other x4"),
        (("K", "Other"), (), True, "mixed kernels"),
        (("UnquantizedLinearMethod",), (), True, "the format was ignored"),
        (("UnquantizedLinearMethod",), ("K",), True, "executed UnquantizedLinearMethod x4"),
        ((), ("K",), True, "no linear layer was found"),
    ],
)
def test_another_kernel_is_invalid(names: tuple[str, ...], classes: tuple[str, ...], quantized: bool, words: str) -> None:
    """A substituted, mixed, ignored or absent kernel is INVALID and says what ran."""
    found = kernel(*names, classes=classes, quantized=quantized)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert words in found.message
    with pytest.raises(Violation):
        found.enforce()


def test_another_number_of_ranks_is_invalid() -> None:
    """Layers that were to be divided and were not, or the other way round, are other kernels' inputs."""
    executed = observation(kernels=("K",)).header.executed
    assert executed is not None
    divided = executed.model_copy(update={"tensor_parallel_size": 2}).model_dump()
    for asked, ran, words in (
        (2, divided, ""),
        (2, executed.model_dump(), "requested 2 ranks, executed K x4"),
        (1, divided, "1 ranks"),
    ):
        found = judging_kernel.kernel(
            observation(executed=ran, engine_args={"tensor_parallel_size": asked}), "fast", ("K",), "all"
        )
        assert ((Verdict.INVALID, False) if words else (Verdict.CONFIRMED, True)) == (found.verdict, found.expected)
        assert words in found.message
        assert ("each on 2 ranks" in found.message) == (ran is divided)


def test_one_kernel_on_two_paths_is_mixed() -> None:
    """The same class with other details (instruction set, quantized activations) computes other bits."""
    layers = [
        Layer(kind="linear", module=module, method="M", kernel="K", detail=detail, count=2)
        for module, detail in (("QKVParallelLinear", "vec"), ("RowParallelLinear", "vec,w4a8"))
    ]
    whole = observation(executed=Executed(layers=tuple(layers)).model_dump())

    found = judging_kernel.kernel(whole, "fast", ("K",), "all")

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "mixed kernels: K[vec] x2 + K[vec,w4a8] x2" in found.message


def test_without_a_declared_pick_one_kernel_is_enough() -> None:
    """Where the matrix does not say what vLLM picks, any one kernel in every layer is confirmed."""
    assert kernel("Whatever", classes=()).expected
    assert kernel("UnquantizedLinearMethod", classes=(), quantized=False).expected


def w4a4(*names: str, native: bool, classes: tuple[str, ...] = (), precision: str = "W4A4") -> Judgement:
    one = observation(kernels=names, dtype="float16")
    weight_only = {"MarlinNvFp4LinearKernel", "MarlinMxFp8LinearKernel"}
    return judging_kernel.kernel(one, "auto", classes, "all", precision=precision, weight_only=weight_only, native=native)


@pytest.mark.parametrize("classes", [(), ("MarlinNvFp4LinearKernel",)])
def test_a_weight_only_kernel_is_said_where_the_chip_cannot_do_better(classes: tuple[str, ...]) -> None:
    """CONFIRMED, in words that nobody takes for W4A4, and as a figure."""
    found = w4a4("MarlinNvFp4LinearKernel", native=False, classes=classes)

    assert (Verdict.CONFIRMED, True, True) == (found.verdict, found.expected, found.figures["kernel.weight_only"])
    assert (
        "kernel: weight-only: executed MarlinNvFp4LinearKernel x4, activations stay float16 (the format is W4A4"
        in found.message
    )


@pytest.mark.parametrize("classes", [(), ("MarlinNvFp4LinearKernel",)])
def test_a_weight_only_kernel_where_the_chip_multiplies_the_format_is_invalid(classes: tuple[str, ...]) -> None:
    """Whether it was picked or asked for: activations that should be FP4 are not."""
    found = w4a4("MarlinNvFp4LinearKernel", native=True, classes=classes)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    words = "W4A4 requested, weight-only kernel MarlinNvFp4LinearKernel executed: activations are not quantized"
    assert words in found.message


def test_weight_only_classes_are_known_in_any_capitals() -> None:
    """vLLM's MarlinMxfp8 is the matrix's MarlinMxFp8."""
    found = w4a4("MarlinMxfp8LinearKernel", native=False, precision="W8A8")

    assert "weight-only: executed MarlinMxfp8LinearKernel x4, activations stay float16 (the format is W8A8" in found.message


@pytest.mark.parametrize("native", [True, False])
def test_other_kernels_and_formats_are_not_called_weight_only(native: bool) -> None:
    """A kernel that quantizes activations; a format that does not ask for it."""
    cutlass = w4a4("CutlassNvFp4LinearKernel", native=native)
    w4a16 = w4a4("MarlinNvFp4LinearKernel", native=native, precision="")

    assert cutlass.expected and w4a16.expected
    assert not cutlass.figures["kernel.weight_only"]
    assert "kernel.weight_only" not in w4a16.figures
    assert "weight-only" not in cutlass.message + w4a16.message


@pytest.mark.parametrize(("native", "verdict"), [(True, Verdict.INVALID), (False, Verdict.CONFIRMED)])
def test_experts_alone_may_be_weight_only(native: bool, verdict: Verdict) -> None:
    """Linear layers that quantize activations do not vouch for experts that do not."""
    whole = observation(kernels=("CutlassInt8ScaledMMLinearKernel",), experts=("MarlinExperts",))
    found = judging_kernel.kernel(
        whole, "auto", (), "all", precision="W8A8", weight_only={"MarlinExperts"}, native=native
    )  # fmt: skip

    assert (verdict, True) == (found.verdict, found.figures["kernel.weight_only"])
    assert "MarlinExperts" in found.message


@pytest.mark.parametrize(
    ("bounds", "length", "exact"),
    [
        ({"min_rows": 20, "max_rows": 40}, 50, {"prefill", "decode"}), ({"max_rows": 40}, 50, {"prefill"}),
        ({"min_rows": 20, "max_rows": 40}, 30, set()), ({"min_rows": 20}, 10, {"prefill", "decode"}),
        ({"min_rows": 20}, 50, set()), ({}, 50, set()),
    ],
)  # fmt: skip
def test_rows_that_noise_does_not_reach(bounds: dict[str, int], length: int, exact: set[str]) -> None:
    """Decode is passes of one row, which read what the prompt's pass wrote."""
    (prompt,) = observation(lengths=(length,)).prompts
    declared = Expect.model_validate({"outcome": "may_be_noisy", "reason": "r", "source": "s", **bounds})

    assert exact == {phase for phase in PHASES if has_to_be_exact(prompt, phase, declared)}


def experts(*names: str, linear: str = "K", quantizes: str = "all", moe_classes: tuple[str, ...] = ("E",)) -> Judgement:
    whole = observation(kernels=(linear,), experts=names)
    return judging_kernel.kernel(whole, "fast", (linear,) if quantizes == "experts" else ("K",), quantizes, moe_classes)


def test_the_requested_experts_are_confirmed() -> None:
    """Both are in the sentence: linear layers and experts."""
    found = experts("E")

    assert (Verdict.CONFIRMED, True) == (found.verdict, found.expected)
    assert "CONFIRMED alpha/bf16/cpu-here kernel: K x4 + E x2 (requested fast)" == found.message
    assert "fast: K, experts E" == found.figures["expectation"]


@pytest.mark.parametrize(
    ("names", "linear", "words"),
    [
        (("Other",), "K", "requested fast (E), executed K x4 + Other x2"),
        (("K",), "K", "requested fast (E)"),  # the linear layers' kernel is not the experts'
        (("E",), "E", "requested fast (K), executed E x6"),
        (("E", "Other"), "K", "mixed kernels: K x4 + E x2 + Other x2"),
        (("UnquantizedFusedMoEMethod",), "K", "executed K x4 + UnquantizedFusedMoEMethod x2"),
        ((), "K", "found no layer of experts"),
    ],
)
def test_other_experts_are_invalid(names: tuple[str, ...], linear: str, words: str) -> None:
    """A substituted, mixed, ignored or absent kernel of experts is INVALID, whatever the linear layers show."""
    found = experts(*names, linear=linear)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert words in found.message


def test_experts_of_a_kernel_that_names_none() -> None:
    """Any one kind of experts is taken, but not a mix, and not unquantized ones in a quantized format."""
    assert experts("Whatever", moe_classes=()).expected
    assert experts("UnquantizedFusedMoEMethod", moe_classes=(), quantizes="").expected
    assert not experts("A", "B", moe_classes=()).expected
    assert "the format was ignored" in experts("UnquantizedFusedMoEMethod", moe_classes=()).message


def test_a_format_of_the_experts_alone() -> None:
    """Its other layers are unquantized, and rightly so; experts that are not, or none at all, are INVALID."""
    plain = "UnquantizedLinearMethod"

    assert experts("E", linear=plain, quantizes="experts").expected
    ignored = experts("UnquantizedFusedMoEMethod", linear=plain, quantizes="experts", moe_classes=())
    assert "for experts, executed" in ignored.message and not ignored.expected
    assert "found no layer of experts" in experts(linear=plain, quantizes="experts", moe_classes=()).message


# -------------------------------------------------------------------------------------------------------------- refusal


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


# -------------------------------------------------------------------------------------------------------------- restart


def test_equal_lifetimes() -> None:
    """Lifetimes with the same bits are BIT_EXACT, with the bound for their number."""
    found = judgements.restart([observation(lifetime=n) for n in range(3)], NOTHING)

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert "0 of 3 lifetimes differ, flip rate < 0.632 per lifetime at 95 %" in found.message


@pytest.mark.parametrize("phase", PHASES)
def test_a_lifetime_that_differs_in_one_bit(phase: Phase) -> None:
    """One bit of one position of one lifetime: NOISY."""
    whole = observation()
    output = changed_output(whole.prompts[1].outputs[0], phase, digests=flipped(3, 31, 7))

    found = judgements.restart([whole, whole, with_outputs(whole, 1, (output,), (0, 0, 0))], NOTHING)

    assert (Verdict.NOISY, False, 2) == (found.verdict, found.expected, found.figures["distinct_outputs"])
    assert "1 of 3 lifetimes differ" in found.message


def test_one_lifetime_says_nothing_of_others() -> None:
    """BIT_EXACT over one of one would be a pass for nothing."""
    found = judgements.restart([observation()], NOTHING)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "needs 2 lifetimes, have 1" in found.message


def test_lifetimes_without_numbers_are_not_compared() -> None:
    """Equal NaN are no equal logits."""
    bad = NonFinite(prompt="p0", phase="decode", repeat=0, position=0)
    lifetimes = [observation(nonfinite=(bad,), lifetime=n) for n in range(2)]

    assert (Verdict.INVALID, False) == ((found := judgements.restart(lifetimes, NOTHING)).verdict, found.expected)


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

    own = judgements.restart(lifetimes((1, phase)), declared)
    both = judgements.restart(lifetimes((1, phase), (0, other)), declared)

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

    assert judgements.restart(lifetimes((0, "prefill")), declared).expected
    assert judgements.restart(lifetimes((1, "decode")), declared).expected
    beyond = judgements.restart(lifetimes((0, "prefill"), (1, "prefill")), declared)

    assert not beyond.expected
    assert "lifetime 2 differs from the first at prompt p1 prefill position 3" in beyond.message


def test_lifetimes_that_may_recompile_may_differ() -> None:
    """The row excuses any lifetime, warm or cold, in both phases; without it none is."""
    declared = row({"when": {}, "outcome": "may_recompile", "max_l2": 0.1})
    for phase in PHASES:
        cold = judgements.restart(lifetimes(None, (1, phase), caches="cold"), declared)
        warm = judgements.restart(lifetimes((1, phase), None), declared)

        assert (Verdict.NOISY, True, "as found,as found,cold") == (cold.verdict, cold.expected, cold.figures["caches"])
        assert "1 of 3 lifetimes differ" in cold.message and "; the last one with cold caches; lifetime 2 " in cold.message
        assert "may_recompile: because [here]" == cold.figures["expectation"]
        assert warm.expected and "cold caches" not in warm.message
        assert not judgements.restart(lifetimes((1, phase), caches="cold"), NOTHING).expected


def test_lifetimes_that_may_recompile_may_differ_so_much() -> None:
    """Farther apart than declared is another thing: other weights, or another kernel. Distances are in the figures."""
    whole = observation()
    output = changed_output(whole.prompts[0].outputs[0], "prefill", digests=flipped(1), topk_logprobs=lambda a: a.__isub__(0.2))
    other = with_outputs(observation(lifetime=1), 0, (output,), (0, 0, 0))
    allowed = [row({"when": {}, "outcome": "may_recompile", "max_l2": most}) for most in (0.05, 5.0)]

    far, near = (judgements.restart([whole, other], one) for one in allowed)

    assert (False, True) == (far.expected, near.expected)
    assert far.figures["max_abs_diff"] == pytest.approx(0.2, rel=1e-3)
    assert "nats, declared are at most 0.05" in far.message and "declared are" not in near.message


# ------------------------------------------------------------------------------------------------------------- messages


def test_every_message_is_one_line_that_starts_with_its_verdict() -> None:
    """Most readers show the first line only."""
    noisy = one_flip(observation(), 0, "decode", 1)
    found = [
        repeat(observation(), "decode"), repeat(noisy, "decode"), kernel("K"), kernel("Other"),
        judgements.restart([observation(), observation()], NOTHING), refusal.refusal(CELL, "no", NOTHING),
        judgements.distinctness(observation(), {CELL: observation("gptq")}, NOTHING),
    ]  # fmt: skip

    for one in found:
        assert one.message.startswith(f"{one.verdict} alpha/bf16/cpu-here")
        assert "\n" not in one.message
        assert one.text.startswith(one.message)
