"""Each layer against what the checkpoint stores of it: what is expected of it, what differs, and what is told of the rest."""

from typing import Any

import pytest

from quantdet.judging import kernel, layers
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.load import load
from quantdet.observations.header import Executed, Layer
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, ROOT
from selftest.fakes.observation import observation

pytest_plugins = ["pytester"]

INT4 = ("qweight:I32", "qzeros:I32", "scales:F16")
INT8 = ("weight:I8", "weight_scale:BF16")
FP8 = ("weight:F8_E4M3", "weight_scale:F32")
PLAIN = ("weight:BF16",)
UNQUANTIZED = "UnquantizedLinearMethod"


def layer(name: str, count: int = 4, stored: tuple[str, ...] = INT4, **more: Any) -> Layer:
    """Layers that show the kernel `name`; unquantized ones show their method only."""
    plain, named = name.startswith("Unq"), more.pop("named", "qkv_proj")
    shape: dict[str, Any] = {"k": 256, "n": 512, **({"bits": 4, "group": 128} if stored is INT4 else {})}
    return Layer.model_validate(
        {
            "kind": "linear", "module": "QKVParallelLinear", "method": name if plain else "SomeLinearMethod",
            "kernel": "" if plain else name, "count": count, "stored": stored,
            "names": [f"layers.{number}.{named}" for number in range(count)], **shape, **more,
        }
    )  # fmt: skip


def head(name: str, stored: tuple[str, ...] = FP8, **more: Any) -> Layer:
    return layer(name, 1, stored, **{"kind": "embedding", "module": "ParallelLMHead", "names": ["lm_head"], **more})


def experts(name: str, stored: tuple[str, ...] = INT4, **more: Any) -> Layer:
    return layer(name, 2, stored, **{"kind": "moe", "module": "FusedMoE", "names": ["layers.0.mlp", "layers.1.mlp"], **more})


def judge(
    *found: Layer, requested: str = "auto", classes: tuple[str, ...] = (), quantizes: str = "all", args: Any = None, **more: Any
) -> Judgement:
    whole = observation(executed=Executed(layers=found).model_dump(), engine_args=args or {})
    return kernel.kernel(whole, requested, classes, quantizes, **more)


def said(judgement: Judgement, verdict: Verdict, *words: str) -> None:
    assert (verdict, verdict is Verdict.CONFIRMED) == (judgement.verdict, judgement.expected), judgement.message
    for word in words:
        assert word in judgement.message


def test_false_red_modules_left_unquantized_on_purpose() -> None:
    """AWQ's modules_to_not_convert, GPTQ's dynamic, ignore lists: right, however many there are, pinned or not."""
    for count in (1, 30):
        found = (layer("K", 2), layer(UNQUANTIZED, count, PLAIN, named="down_proj"))

        said(judge(*found), Verdict.CONFIRMED, f"K x2 + UnquantizedLinearMethod x{count} (nothing requested")
        said(judge(*found, requested="fast", classes=("K",)), Verdict.CONFIRMED, "requested fast", "left unquantized: layers.0")
        said(judge(experts("E"), layer(UNQUANTIZED, count, PLAIN)), Verdict.CONFIRMED)


def test_false_green_quantized_layers_that_run_unquantized_are_named() -> None:
    """The first three by name, and how many."""
    said(
        judge(layer("K"), layer(UNQUANTIZED, 5, named="o_proj"), requested="auto"), Verdict.INVALID,
        "stored quantized, executed unquantized: layers.0.o_proj, layers.1.o_proj, layers.2.o_proj, ... (5 layers): "
        "UnquantizedLinearMethod x5",
    )  # fmt: skip
    said(judge(layer("K"), head("UnquantizedEmbeddingMethod")), Verdict.INVALID, "stored quantized", "lm_head (1 layer)")
    said(judge(layer("K"), experts("UnquantizedFusedMoEMethod")), Verdict.INVALID, "layers.0.mlp, layers.1.mlp (2 layers)")


def test_layers_stored_unquantized_and_executed_quantized() -> None:
    """Right where the checkpoint is plain and the engine was told to quantize it; else INVALID, by name."""
    words = "stored unquantized, executed quantized: layers.0.qkv_proj, layers.1.qkv_proj (2 layers): K x2"
    asked = {"quantization": "fp8"}

    said(judge(layer("K", 2, PLAIN), quantizes=""), Verdict.INVALID, words)
    said(judge(layer("K", 2, PLAIN), quantizes="", args=asked), Verdict.CONFIRMED)
    said(judge(layer("K", 2, PLAIN), online=True), Verdict.CONFIRMED)
    said(judge(layer("K", 2, PLAIN), layer("J"), args=asked), Verdict.INVALID, words)  # the name of its own quantization
    said(judge(layer("K", 2, PLAIN), layer(UNQUANTIZED, 1, PLAIN), quantizes="", args=asked), Verdict.CONFIRMED)


def test_a_pinned_kernel_is_in_every_quantized_layer() -> None:
    """Those that differ are named; the head and the experts are among them."""
    pinned: dict[str, Any] = {"requested": "fast", "classes": ("K",)}

    said(judge(layer("K"), layer("K", k=512), **pinned), Verdict.CONFIRMED, "K x8 (requested fast)")
    said(
        judge(layer("K"), layer("J", 2, named="o_proj", k=512), **pinned), Verdict.INVALID,
        "requested fast (K), executed J x2 in layers.0.o_proj, layers.1.o_proj (2 layers)",
    )  # fmt: skip
    said(judge(layer("K"), head("J"), **pinned), Verdict.INVALID, "requested fast (K), executed J x1 in lm_head (1 layer) (F8")
    said(judge(layer("K"), experts("J"), moe_classes=("E",), **pinned), Verdict.INVALID, "requested fast (E), executed J x2 in")
    said(judge(layer("K"), experts("E"), moe_classes=("E",), **pinned), Verdict.CONFIRMED)


def test_kernels_that_differ_by_shape_are_described() -> None:
    """Nothing is known of what vLLM should pick: other shapes may run other kernels, and that is said."""
    found = judge(layer("K"), layer("J", 2, k=96, n=512), layer("J", 1, k=96, n=64))

    said(
        found, Verdict.CONFIRMED,
        "(nothing requested: vLLM's own choice); two kernels by shape (N x K): K x4 (512x256), J x3 (512x96, 64x96)",
    )  # fmt: skip
    said(judge(layer("K"), layer("K", k=96)), Verdict.CONFIRMED, "own choice, the same in every layer)")


@pytest.mark.parametrize("shape", [{}, {"k": None, "n": None}])
@pytest.mark.parametrize("other", [{"kernel": "J"}, {"detail": "w4a8"}])
def test_layers_that_look_alike_and_run_other_kernels_are_mixed(shape: dict[str, Any], other: dict[str, Any]) -> None:
    """The very same shape, scheme and stored tensors; so are layers of which nobody told the shape. Pinned or not."""
    odd = layer("K", 2, named="o_proj", **shape).model_copy(update=other)
    for classes in ((), ("K", "J")):
        found = judge(layer("K", **shape), odd, classes=classes)

        said(found, Verdict.INVALID, "mixed kernels: K x4 + ", "layers of one shape and scheme: layers.0.qkv_proj")


def test_plain_layers_are_one_kernel_too() -> None:
    """Of an unquantized format: another class than the requested one, or two paths in layers that look alike."""
    plain: dict[str, Any] = {"requested": "unquantized", "classes": (UNQUANTIZED,), "quantizes": ""}
    other = layer("UnquantizedOtherMethod", 1, PLAIN, k=96)

    said(judge(layer(UNQUANTIZED, 4, PLAIN), layer(UNQUANTIZED, 4, PLAIN, k=96), **plain), Verdict.CONFIRMED)
    said(judge(layer(UNQUANTIZED, 4, PLAIN), other, **plain), Verdict.INVALID, "executed UnquantizedOtherMethod x1 in layers.0")
    paths = judge(layer(UNQUANTIZED, 4, PLAIN), layer(UNQUANTIZED, 4, PLAIN, detail="amx"), quantizes="")
    said(paths, Verdict.INVALID, "mixed kernels")
    said(judge(layer(UNQUANTIZED, 4, PLAIN), experts("UnquantizedFusedMoEMethod", PLAIN), **plain), Verdict.CONFIRMED)
    said(judge(layer("K"), **plain), Verdict.INVALID, "requested unquantized (UnquantizedLinearMethod), executed K x4")


def test_several_schemes_are_judged_by_themselves_and_named() -> None:
    """Mixed groups, bits and number formats; a bias makes no scheme of its own."""
    biased = layer("K", 1, (*INT4, "bias:F16"), bits=4, group=128, n=768)
    found = judge(layer("K"), biased, layer("J", 2, group=32), layer("C", 3, INT8, bits=8, group=256))

    said(
        found, Verdict.CONFIRMED,
        "; 4 bits (I32), groups of 128: K x5; 4 bits (I32), groups of 32: J x2; 8 bits (I8), one scale a channel: C x3",
    )  # fmt: skip
    said(judge(layer("K"), layer("K", 1, group=32), layer("J", 1, group=32)), Verdict.INVALID, "mixed kernels: K x1 + J x1")


def test_a_group_as_long_as_the_inputs_is_a_channels() -> None:
    """Unless longer layers have groups of that length too."""
    channel = layers.schemes([layer("K", group=256), layer("K", k=512, group=512)])
    groups = layers.schemes([layer("K", k=128, group=128), layer("K", k=256, group=128)])

    assert ["4 bits (I32), one scale a channel"] == [scheme.text for scheme in channel]
    assert ["4 bits (I32), groups of 128"] == [scheme.text for scheme in groups]


def test_false_green_a_quantized_head_stands_in_the_verdict() -> None:
    """An FP8 head on an INT8 body: in the sentence, in the summary and as a scheme of its own; an unquantized one is not."""
    body = layer("CPUInt8", 8, INT8, bits=8, group=256)
    found = judge(body, head("Fp8Kernel", bits=8, group=256))

    said(
        found, Verdict.CONFIRMED, "CPUInt8 x8 + head Fp8Kernel x1 (nothing requested",
        "; 8 bits (I8), one scale a channel: CPUInt8 x8; head, 8 bits (F8_E4M3), one scale a channel: Fp8Kernel x1",
    )  # fmt: skip
    assert "CPUInt8 x8 + head Fp8Kernel x1" == found.figures["kernel.executed"]
    assert "CPUInt8 x8" == Executed(layers=(body, head("UnquantizedEmbeddingMethod", PLAIN))).summary
    older = head("Fp8Kernel").model_copy(update={"stored": ()})
    assert "CPUInt8 x8" == Executed(layers=(body, older)).summary  # as it was recorded


def test_experts_are_plain_by_their_dtypes_whatever_their_tensors_are_called() -> None:
    """Weights of all experts may be one tensor with a name of its own."""
    fused = ("down_proj:BF16", "gate_up_proj:BF16")

    said(judge(layer("K"), experts("UnquantizedFusedMoEMethod", fused)), Verdict.CONFIRMED)
    assert layers.quantized(experts("E", ("gate_up_proj_blocks:U8",))) is True
    assert layers.quantized(experts("E", ("weight:F16", "weight_scale:F32"))) is True  # numbers kept in a wider dtype
    transformers = experts("Qwen3MoeExperts", fused, module="Qwen3MoeExperts", method="Qwen3MoeExperts")
    said(judge(layer(UNQUANTIZED, 4, PLAIN), transformers, quantizes=""), Verdict.CONFIRMED)


@pytest.mark.parametrize("stored", [PLAIN, ()])
def test_false_green_an_online_quantization_that_changed_nothing(stored: tuple[str, ...]) -> None:
    """INVALID, in new observations and in those that do not say what is stored."""
    plain = layer(UNQUANTIZED, 4, stored)
    words = "nothing was quantized: no layer differs from the unquantized kernel"

    said(judge(plain, quantizes="", args={"quantization": "int8_per_channel_weight_only"}), Verdict.INVALID, words)
    said(judge(plain, quantizes="", classes=(UNQUANTIZED,), args={"quantization": "nvfp4_per_token"}), Verdict.INVALID, words)
    said(judge(plain, quantizes="", args={"quantization": None}), Verdict.CONFIRMED)
    mixture = judge(plain, experts("Int8Experts", stored), quantizes="", args={"quantization": "experts_int8"})
    assert mixture.expected


def test_a_quantized_format_of_a_plain_checkpoint_is_invalid() -> None:
    """A row that asks for a kernel, and nothing to run it on."""
    found = judge(layer(UNQUANTIZED, 4, PLAIN), requested="fast", classes=("K",))

    said(found, Verdict.INVALID, "requested fast, executed UnquantizedLinearMethod x4: the checkpoint holds no quantized layer")


def test_layers_of_which_nobody_tells_what_is_stored_are_said() -> None:
    """Among others of which it is known: neither right nor wrong."""
    found = judge(layer("K"), layer(UNQUANTIZED, 1, (), named="kv_b_proj"), layer("K", 1, (), bits=None, group=None))

    said(found, Verdict.CONFIRMED, "not known what the checkpoint stores of: layers.0.kv_b_proj (1 layer)")
    assert "not known what is stored: K x1" in found.message


def test_experts_alone() -> None:
    """A format that quantizes these: other layers are plain in the checkpoint, and are not told as left out."""
    row: dict[str, Any] = {"requested": "fast", "classes": (UNQUANTIZED,), "moe_classes": ("E",), "quantizes": "experts"}

    found = judge(layer(UNQUANTIZED, 4, PLAIN), experts("E"), **row)
    said(found, Verdict.CONFIRMED, "UnquantizedLinearMethod x4 + E x2 (requested fast)")
    said(judge(layer("K"), experts("E"), **row), Verdict.INVALID, "requested fast (UnquantizedLinearMethod), executed K x4")


# ------------------------------------------------------------------------------------------- vLLM's own choice, by layer

HOPPER = {"machete": "MacheteLinearKernel", "marlin": "MarlinLinearKernel", "humming": "HummingLinearKernel"}


def picked(
    *found: Layer, version: str, format_id: str = "gptq_auto", hardware: str = "sm90", humming: bool = True
) -> Judgement:
    matrix, cell = load(ROOT / "quant_matrix.toml"), Cell("tiny-qwen3", format_id, hardware)
    packages = ("humming-kernels",) if humming else ()
    name, classes = matrix.kernel_classes(cell, version, packages)
    return judge(
        *found, requested=f"auto -> {name}", classes=classes,
        expected=lambda layer: matrix.kernel_classes(cell, version, packages, layers.shape_of(layer)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "humming", "right", "wrong"),
    [("0.26.0", True, "marlin", "machete"), ("0.33.0", True, "humming", "marlin"), ("0.33.0", False, "marlin", "humming")],
)
def test_false_red_groups_of_32_on_hopper(version: str, humming: bool, right: str, wrong: str) -> None:
    """They are not Machete's: the next kernel of vLLM's list is right, another one is not."""
    small = picked(layer(HOPPER[right], group=32), version=version, humming=humming)

    said(small, Verdict.CONFIRMED, f"requested auto -> {right})")
    assert (f"auto -> {right}", f"auto -> {right}: {HOPPER[right]}") == (
        small.figures["kernel.requested"], small.figures["expectation"].partition(" or ")[0],
    )  # fmt: skip
    said(
        picked(layer(HOPPER[wrong], group=32), version=version, humming=humming), Verdict.INVALID,
        f"requested auto -> {right} ({HOPPER[right]}", f"executed {HOPPER[wrong]} x4",
    )  # fmt: skip
    said(picked(layer(HOPPER["machete"]), version=version, humming=humming), Verdict.CONFIRMED, "requested auto -> machete)")


def test_a_shape_that_machete_does_not_take() -> None:
    """Two kernels in one model, each where it has to be: told, and not mixed."""
    found = picked(layer("MacheteLinearKernel"), layer("MarlinLinearKernel", 2, n=576), version="0.26.0")

    said(found, Verdict.CONFIRMED, "requested auto -> machete, marlin)", "two kernels by shape (N x K): Machete")
    said(picked(layer("MarlinLinearKernel"), version="0.26.0"), Verdict.INVALID, "auto -> machete (MacheteLinearKernel)")


def test_picks_say_nothing_of_layers_of_other_numbers() -> None:
    """An FP8 head on an INT4 body, and groups that no kernel of the list takes: reported, not judged."""
    said(picked(layer("MacheteLinearKernel"), head("CutlassFP8", bits=8, group=256), version="0.26.0"), Verdict.CONFIRMED)
    said(picked(layer("Whatever", group=16), version="0.26.0"), Verdict.CONFIRMED, "requested auto -> machete")
    said(picked(head("CPUFp8"), layer("CPUWNA16LinearKernel"), hardware="cpu-amx", version="0.32.0"), Verdict.CONFIRMED)


BY_GROUPS = (
    MATRIX.replace('classes = ["Fake4Kernel"]', 'classes = ["Fake4Kernel"]\ngroups = [64]', 1)
    .replace('picks = { "cpu-*" = "fake4" }', 'picks = { "cpu-*" = { ">=0" = ["fake4", "fake8"] } }')
    .replace(
        'args = { executes = "Fake4Kernel" }', 'args = { executes = "Fake8Kernel", stored = "qweight:I32", group = GROUP }'
    )
)


@pytest.mark.parametrize(("group", "verdict", "words"), [
    (32, "CONFIRMED", "auto -> fake8: Fake8Kernel"),
    (64, "INVALID", "requested auto -> fake4 (Fake4Kernel), executed Fake8Kernel x4"),
])  # fmt: skip
def test_the_session_asks_the_matrix_by_layer(suite: Suite, group: int, verdict: str, words: str) -> None:
    """The layers' own groups decide which kernel of the list is expected of them."""
    run = suite("-k", "alpha and awq and cpu-here and test_kernel", matrix=BY_GROUPS.replace("GROUP", str(group)))

    case = run.cases["test_kernel[alpha/awq/cpu-here]"]
    assert verdict == case.verdict, run.output
    assert words in f"{case.message} {case.properties['expectation']}"
