"""The executed kernel is the requested one: every way in which it is not."""

import pytest

from quantdet.judging import kernel as judging_kernel
from quantdet.judging.differences import has_to_be_exact
from quantdet.judging.verdicts import Judgement, Verdict, Violation
from quantdet.matrix.cell import PHASES
from quantdet.matrix.expectations import Expect
from quantdet.observations.header import Executed, Layer
from selftest.fakes.observation import observation


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
