"""Pairs of formats on the same forced ids: identical, distinct, or lost in their own noise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging.pairs import pair
from quantdet.judging.repeat import distinctness
from quantdet.judging.verdicts import Judgement, Pair, Verdict, Violation
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.comparable import comparable
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation
from quantdet.session.machine.environment import RELEVANT
from quantdet.session.session import Session
from selftest.fakes import changed_output, executed, last_repeat, observation, with_outputs

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


# ---------------------------------------------------------------------------------------------------------------- pairs


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


# --------------------------------------------------------------------------------------------------------- comparability


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (observation("gptq", workload_sha256="3" * 64), "workloads differ"),
        (observation("gptq", lengths=(6,)), "workloads differ"),
        (observation("gptq", lengths=(6, 10)), "token ids of prompt p1 differ"),
        (observation("gptq", top_k=5), "run lengths differ"),
        (observation("gptq", decode_tokens=5), "run lengths differ"),
    ],
)
def test_what_cannot_be_compared_is_invalid(other: Observation, words: str) -> None:
    """Other prompts, ids or lengths: no distance is given, the verdict is INVALID and says why."""
    assert words == comparable(BF16, other)

    found = judge(BF16, other)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert f"cannot be compared with gptq: {words}" in found.message


def test_the_same_workload_can_be_compared() -> None:
    """Repeats may differ in number."""
    assert comparable(BF16, observation("gptq", repeats=7)) is None


def test_formats_of_two_environments_are_not_compared() -> None:
    """Another torch or CPU makes other bits of the same format; another unit of one GPU, and what a format brings, do not."""
    here = observation("bf16", environment={"torch": "2.13", "gpu_uuid": "GPU-a", "start": "spawn"})

    assert comparable(here, observation("gptq", environment={"torch": "2.13", "gpu_uuid": "GPU-b", "start": "fork"})) is None
    other = observation("gptq", environment={"torch": "2.12", "gpu_uuid": "GPU-a", "cpus": 2})
    assert "environments differ in cpus, torch" == comparable(here, other)
    found = judge(here, other)
    assert (Verdict.INVALID, False) == (found.verdict, found.expected)


def here(ranks: int = 1, **environment: Any) -> Observation:
    """Something measured in this environment, by so many ranks."""
    ran = executed("UnquantizedLinearMethod").model_copy(update={"tensor_parallel_size": ranks})
    return observation("gptq", environment=environment, executed=ran.model_dump())


def test_the_host_decides_on_a_cpu_only() -> None:
    """Threads and CPUs divide a CPU's work, not a GPU's; of two observations both have to be a GPU's."""
    few, many = {"cpus": 2, "torch_threads": 2}, {"cpus": 64, "torch_threads": 64}
    gpu = {"device_uuid": "GPU-a"}

    assert comparable(here(**few, **gpu), here(**many, device_uuid="GPU-b")) is None
    assert comparable(here(**few), here(**many)) == "environments differ in cpus, torch_threads"
    assert comparable(here(**few, **gpu), here(**many)) == "environments differ in cpus, torch_threads"
    assert comparable(here(cpu="A", **gpu), here(cpu="B", **gpu)) == "environments differ in cpu"


def test_variables_that_differ_are_named() -> None:
    """Each by its name, set or not."""
    one = here(variables={"VLLM_USE_DEEP_GEMM": "0", "OMP_NUM_THREADS": "2"})
    other = here(variables={"VLLM_USE_DEEP_GEMM": "1"})

    assert comparable(one, other) == "environments differ in variables (OMP_NUM_THREADS, VLLM_USE_DEEP_GEMM)"
    assert comparable(here(), here(variables={})) is None


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_which_device_is_shown_is_no_difference(name: str) -> None:
    """Whichever of several like devices it was."""
    assert comparable(here(variables={name: "0"}), here(variables={name: "1"})) is None


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_ALGO", "TORCH_NCCL_AVOID_RECORD_STREAMS", "RCCL_MSCCL_ENABLE", "NVSHMEM_DISABLE_NVLS",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_USE_NCCL_SYMM_MEM", "VLLM_DISABLE_PYNCCL",
    ],
)  # fmt: skip
def test_what_ranks_exchange_sums_by(name: str) -> None:
    """It is part of a format of several ranks, and nothing to one of a single rank; two such formats need it to be the same."""
    told, otherwise = {name: "0"}, {name: "1"}

    assert comparable(here(variables=told), here()) is None
    assert comparable(here(ranks=2, variables=told), here(variables=otherwise)) is None
    assert comparable(here(ranks=2, variables=told), here(ranks=2)) == f"environments differ in variables ({name})"
    assert comparable(here(ranks=2, variables=told), here(ranks=2, variables=otherwise)) is not None
    assert RELEVANT.match(name)  # or it would not be recorded


@pytest.mark.parametrize("name", ["VLLM_USE_DEEP_GEMM", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "VLLM_NCCL_SO_PATH", "XNCCL_ALGO"])
def test_other_variables_stay_strict(name: str) -> None:
    """For formats of one rank too."""
    assert comparable(here(variables={name: "0"}), here()) == f"environments differ in variables ({name})"


def test_unknown_ranks_are_strict() -> None:
    """Of what did not tell what it executed."""
    mute = [observation("gptq", executed=None, environment={"variables": {"NCCL_ALGO": value}}) for value in ("Ring", "Tree")]

    assert comparable(*mute) == "environments differ in variables (NCCL_ALGO)"


# ---------------------------------------------------------------------------------------------------------- distinctness


def test_distinct_from_all() -> None:
    """DISTINCT from every peer, and the closest is named."""
    found = judge(BF16, GPTQ, observation("awq"))

    assert (Verdict.DISTINCT, True, 2) == (found.verdict, found.expected, found.figures["pairs"])
    assert "DISTINCT from 2 of 2 formats; closest " in found.message
    closest = min(found.pairs, key=lambda one: one.l2)
    assert closest.b == found.figures["closest"]
    assert ("distinct", "") == (found.figures["expectation"], found.figures["identical_to"])


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
    silent = with_header(CT, numbers="", checkpoint_sha256="9" * 64)
    words = {"gptq": "int4-sym/none", "ct": "int4-asym/none"}

    strangers = judge(GPTQ, silent, expectations=Expectations((), words=words))
    assert (Verdict.IDENTICAL, False) == (strangers.verdict, strangers.expected)
    assert "other numbers by the matrix (int4-sym/none against int4-asym/none)" in strangers.message
    alike = judge(GPTQ, silent, expectations=Expectations((), words=dict.fromkeys(words, "int4-sym/none")))
    assert alike.expected and "either verdict passes against ct: the same kernels" in alike.message


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
    assert peer.header.format == found.figures["identical_to"]
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
