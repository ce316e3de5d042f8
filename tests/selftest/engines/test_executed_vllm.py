"""`kernels.describe` on plain objects of the shapes that vLLM's layers have."""

from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.engines.child.executed_vllm import describe
from quantdet.engines.child.stored import Stored
from quantdet.observations.header import Executed, Layer


def make(name: str, **attributes: Any) -> Any:
    """An object of a new class `name`."""
    instance = type(name, (), {})()
    for key, value in attributes.items():
        setattr(instance, key, value)
    return instance


def model(*modules: Any) -> Any:
    return SimpleNamespace(named_modules=lambda: [(str(i), module) for i, module in enumerate(modules)])


def walked(*named: tuple[str, Any]) -> Any:
    """A model whose modules have names."""
    return SimpleNamespace(named_modules=lambda: list(named))


def only(module: Any) -> Layer:
    (layer,) = describe(model(module)).layers
    return layer


def test_unquantized() -> None:
    """The method is what multiplies; modules without a method are no layers."""
    linear = make("QKVParallelLinear", quant_method=make("UnquantizedLinearMethod"))
    norm = make("RMSNorm")

    found = describe(model(norm, linear, linear, make("Dropout", quant_method=None)))

    wanted = Layer(kind="linear", module="QKVParallelLinear", method="UnquantizedLinearMethod", count=2, names=("1", "2"))
    assert (wanted,) == found.layers
    assert "UnquantizedLinearMethod x2" == found.summary


def test_a_kernel_below_the_method() -> None:
    """GPTQ and AWQ: the method holds the kernel."""
    found = only(make("RowParallelLinear", quant_method=make("GPTQMarlinLinearMethod", kernel=make("MarlinLinearKernel"))))

    assert ("GPTQMarlinLinearMethod", "", "MarlinLinearKernel") == (found.method, found.scheme, found.kernel)
    assert "MarlinLinearKernel" == found.executed


@pytest.mark.parametrize("attribute", ["kernel", "fp8_linear", "linear_kernel"])
def test_a_kernel_below_the_scheme(attribute: str) -> None:
    """compressed-tensors: the layer's scheme holds the kernel, under one of three names."""
    scheme = make("CompressedTensorsW8A8Fp8", **{attribute: make("CutlassFP8ScaledMMLinearKernel")})
    found = only(make("ColumnParallelLinear", quant_method=make("CompressedTensorsLinearMethod"), scheme=scheme))

    assert ("CompressedTensorsW8A8Fp8", "CutlassFP8ScaledMMLinearKernel") == (found.scheme, found.kernel)
    assert "CutlassFP8ScaledMMLinearKernel" == found.executed


def test_a_scheme_without_a_kernel() -> None:
    """The scheme is what multiplies."""
    method = make("CompressedTensorsLinearMethod")

    assert (
        "CompressedTensorsW4A16Fp4"
        == only(make("ColumnParallelLinear", quant_method=method, scheme=make("CompressedTensorsW4A16Fp4"))).executed
    )


def test_a_scheme_that_is_none() -> None:
    """A layer that its format leaves out has `scheme = None`."""
    assert (
        "UnquantizedLinearMethod"
        == only(make("ReplicatedLinear", quant_method=make("UnquantizedLinearMethod"), scheme=None)).executed
    )


def test_the_instruction_set_is_a_detail() -> None:
    """What changes the bits inside one kernel (AMX or vector code, INT8 activations) tells two runs apart."""
    method = make("GPTQMarlinLinearMethod", kernel=make("CPUWNA16LinearKernel"))
    amx = describe(model(make("RowParallelLinear", quant_method=method, isa_hint="amx")))
    vec = describe(model(make("RowParallelLinear", quant_method=method, isa_hint="vec")))
    int8 = describe(model(make("RowParallelLinear", quant_method=method, isa_hint="vec", use_w4a8=True)))

    assert len({amx.summary, vec.summary, int8.summary}) == 3
    assert "amx" in amx.summary
    assert "vec" in vec.summary


def test_the_path_inside_a_kernel_is_a_detail() -> None:
    """A kernel that chose one of several functions says which."""

    def _apply_weights_torch_scaled_mm() -> None: ...

    kernel = make("TorchFP8Kernel", linear_method=_apply_weights_torch_scaled_mm)
    found = only(make("RowParallelLinear", quant_method=make("Fp8LinearMethod", fp8_linear=kernel)))

    assert "torch_scaled_mm" == found.detail


def test_two_kernels_in_one_layer_are_both_told() -> None:
    """FP8 block on Hopper: the layer chooses per call; the names of both are in the detail."""
    kernel = make("BlockScaledKernel", base=make("DeepGemmKernel"), fallback=make("CutlassKernel"))
    found = only(make("RowParallelLinear", quant_method=make("Fp8LinearMethod", fp8_linear=kernel)))

    assert "base=DeepGemmKernel,fallback=CutlassKernel" == found.detail


def test_torchao_shows_its_tensor() -> None:
    """The tensor subclass is the kernel."""
    weight = make("AffineQuantizedTensor")
    found = only(make("RowParallelLinear", quant_method=make("TorchAOLinearMethod"), weight=weight))

    assert "weight=AffineQuantizedTensor" == found.detail


def test_a_plain_weight_is_no_detail() -> None:
    """Other methods' weights are tensors like any."""
    assert "" == only(make("RowParallelLinear", quant_method=make("UnquantizedLinearMethod"), weight=make("Parameter"))).detail


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("QKVParallelLinear", "linear"),
        ("MergedColumnParallelLinear", "linear"),
        ("ParallelLMHead", "embedding"),
        ("VocabParallelEmbedding", "embedding"),
        ("FusedMoE", "moe"),
        ("RoutedExperts", "moe"),
        ("Attention", "other"),
    ],
)
def test_kinds_of_layers(name: str, kind: str) -> None:
    """Embeddings, experts and attention are not judged as linear layers."""
    assert kind == only(make(name, quant_method=make("Method"))).kind


def test_experts_show_their_kernel() -> None:
    """A mixture of experts multiplies in what its method built."""
    method = make("Fp8MoEMethod", moe_kernel=make("ModularKernel", fused_experts=make("CutlassExpertsFp8")))

    assert "CutlassExpertsFp8" == only(make("FusedMoE", quant_method=method)).kernel


@pytest.mark.parametrize("attribute", ["unquantized_backend", "wna16_moe_backend", "fp8_backend"])
def test_experts_show_their_backend(attribute: str) -> None:
    """An enum by its name, or plain text."""
    for backend in (SimpleNamespace(name="MARLIN"), "Marlin"):
        assert "marlin" == only(make("FusedMoE", quant_method=make("MoEMethod", **{attribute: backend}))).detail


def test_experts_without_a_kernel_of_their_own_show_their_method() -> None:
    """moe_wna16 up to vLLM 0.26: the method calls what multiplies."""
    assert "MoeWNA16Method" == only(make("RoutedExperts", quant_method=make("MoeWNA16Method", moe_kernel=None))).executed


@pytest.mark.parametrize("name", ["ReplicatedLinear", "GateLinear"])
def test_a_router_is_no_linear_layer(name: str) -> None:
    """It stays unquantized; that is no mixture of kernels."""
    router = make(name, quant_method=make("UnquantizedLinearMethod"))
    qkv = make("QKVParallelLinear", quant_method=make("M", kernel=make("K")))
    moe = make("RoutedExperts", quant_method=make("E"))
    named = {"layers.0.self_attn.qkv_proj": qkv, "layers.0.mlp.gate": router, "layers.0.mlp.experts": moe}

    found = describe(SimpleNamespace(named_modules=named.items))

    assert {"router", "linear", "moe"} == {layer.kind for layer in found.layers}
    assert "K x1 + E x1" == found.summary
    assert ("K",) == tuple(layer.executed for layer in found.linear)


def test_only_linear_layers_are_in_the_summary() -> None:
    """Embedding and head are not counted; different kernels are listed apart, with their numbers."""
    one = make("RowParallelLinear", quant_method=make("M", kernel=make("A")))
    two = make("QKVParallelLinear", quant_method=make("M", kernel=make("B")))
    head = make("ParallelLMHead", quant_method=make("UnquantizedEmbeddingMethod"))

    found = describe(model(one, two, two, head))

    assert "B x2 + A x1" == found.summary or "A x1 + B x2" == found.summary
    assert {"A", "B"} == {layer.executed for layer in found.linear}


def test_no_linear_layer() -> None:
    """An empty walk says so."""
    assert "no linear layer" == describe(model()).summary


def test_attention_backends() -> None:
    """The backend by its own name, with the FlashAttention version where there is one; each once."""
    named = make("FlashAttentionBackend", get_name=lambda: "FLASH_ATTN")
    flash = make("Attention", attn_backend=named, impl=make("Impl", vllm_flash_attn_version=3))
    plain = make("Attention", attn_backend=make("TorchSdpaBackend"))

    assert ("FLASH_ATTN FA3", "TorchSdpaBackend") == describe(model(flash, flash, plain)).attention


def test_the_order_of_layers_does_not_matter() -> None:
    """Two walks over the same layers in another order give the same record."""
    names = ("QKVParallelLinear", "RowParallelLinear")
    layers = [(name, make(name, quant_method=make("M", kernel=make("K")))) for name in names]

    assert describe(walked(*layers)) == describe(walked(*reversed(layers)))


def test_layers_that_hold_something_else_are_rows_of_their_own() -> None:
    """One kernel, but other tensors of the checkpoint, another shape or other groups; what was not observed stays empty."""
    one, two, three, four = (make("RowParallelLinear", quant_method=make("M", kernel=make("K"))) for _ in range(4))
    held = Stored(("qweight:I32", "scales:F16"), k=64, n=32, bits=4, group=32)
    layers = {id(one): held, id(two): held, id(three): Stored(held.stored, k=128, n=32, bits=4, group=32)}

    found = describe(walked(("a", one), ("b", two), ("c", three), ("d", four)), layers).layers

    assert {("a", "b"): (64, held.stored), ("c",): (128, held.stored), ("d",): (None, ())} == {
        layer.names: (layer.k, layer.stored) for layer in found
    }
    assert [2, 1, 1] == sorted((layer.count for layer in found), reverse=True)


def test_a_wrapper_is_no_second_layer() -> None:
    """LoRA: the wrapper answers for what it wraps, which is walked too and has the wrapper's name."""
    method = make("AutoGPTQLinearMethod", kernel=make("K"))
    inner = make("QKVParallelLinear", quant_method=method)
    wrapper = make("MergedQKVParallelLinearWithLoRA", base_layer=inner, quant_method=method)
    router = make("ReplicatedLinear", quant_method=make("UnquantizedLinearMethod"))
    around = make("ReplicatedLinearWithLoRA", base_layer=router, quant_method=router.quant_method)

    found = describe(
        walked(("a.qkv", wrapper), ("a.qkv.base_layer", inner), ("mlp.gate", around), ("mlp.gate.base_layer", router))
    )

    assert {("QKVParallelLinear", "linear", ("a.qkv",)), ("ReplicatedLinear", "router", ("mlp.gate",))} == {
        (layer.module, layer.kind, layer.names) for layer in found.layers
    }
    assert "K x1" == found.summary


def test_the_method_inside_another_one() -> None:
    """auto-round's method holds a scheme, which holds the method that multiplies; a scheme without one is what multiplies."""
    inside = make("AutoGPTQLinearMethod", kernel=make("CPUWNA16LinearKernel"))
    found = only(make("RowParallelLinear", quant_method=make("INCLinearMethod", scheme=make("INCWNA16", linear_method=inside))))

    assert ("AutoGPTQLinearMethod", "CPUWNA16LinearKernel") == (found.method, found.kernel)
    plain = only(make("RowParallelLinear", quant_method=make("INCLinearMethod", scheme=make("INCMxfp8", kernel=make("X")))))
    assert ("INCLinearMethod", "INCMxfp8", "X") == (plain.method, plain.scheme, plain.kernel)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"kv_cache_dtype": "auto"}, ("float16",)),
        ({"kv_cache_dtype": "auto", "kv_cache_torch_dtype": "torch.bfloat16"}, ("bfloat16",)),
        ({"kv_cache_dtype": "fp8", "_k_scale_float": 1.0, "_v_scale_float": 1.0}, ("fp8_e4m3",)),
        (
            {"kv_cache_dtype": "fp8_e4m3", "_k_scale_float": 0.05000000074505806, "_v_scale_float": 0.04},
            ("fp8_e4m3, k_scale 0.05, v_scale 0.04",),
        ),
        ({"kv_cache_dtype": "fp8_e5m2", "_q_scale_float": 0.5}, ("fp8_e5m2, q_scale 0.5",)),
        ({}, ()),
    ],
)  # fmt: skip
def test_the_kv_cache(attributes: dict[str, Any], words: tuple[str, ...]) -> None:
    """Dtype and scales of each kind of attention layer, once; "auto" is the model's dtype."""
    attention = make("Attention", attn_backend=make("Sdpa"), **attributes)

    assert words == describe(model(attention, attention), dtype="float16").kv_cache


def test_layers_may_keep_other_scales() -> None:
    """Each kind is told."""
    kept = [
        make("Attention", attn_backend=make("Sdpa"), kv_cache_dtype="fp8_e4m3", _k_scale_float=scale) for scale in (0.5, 2.0)
    ]

    assert ("fp8_e4m3, k_scale 0.5", "fp8_e4m3, k_scale 2") == describe(model(*kept)).kv_cache


def test_a_scale_of_each_head() -> None:
    """The least and the largest."""
    heads = make("Tensor", numel=lambda: 2, min=lambda: 0.25, max=lambda: 0.5)
    found = describe(model(make("Attention", attn_backend=make("Sdpa"), kv_cache_dtype="fp8_e4m3", _k_scale=heads)))

    assert ("fp8_e4m3, k_scale 0.25 to 0.5",) == found.kv_cache


def test_the_record_is_json() -> None:
    """It goes into the observation's header and comes back the same."""
    found = describe(model(make("RowParallelLinear", quant_method=make("M"), isa_hint="amx")))

    assert found == Executed.model_validate_json(found.model_dump_json())
