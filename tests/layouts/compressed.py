"""compressed-tensors, by scheme."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from layouts.checkpoint import Checkpoint, Encode, Tensors, body, plain, quantized, shared_amax, where
from layouts.integers import MLP_OF_0, in_mlp
from quantdet.checkpoints.layouts import compressed_tensors as ct
from quantdet.checkpoints.quantize import FUSED_SCALE, quantize
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights

Config = dict[str, Any]

_INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_INT8_TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
_FP8_TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_FP8_BLOCK = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}
_FP8_GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True}
_KV_FP8 = {**_FP8_TENSOR, "block_structure": None, "group_size": None, "observer": "minmax"}
_INPUT_SCALE = np.array([0.05], np.float32)  # inputs of the projections, after norms: largest magnitude about 6


def tensors_of(weights: Weights, activations: Activations, group: int, module: str, weight: Array) -> Tensors:
    """One projection as the layout of the suite writes it."""
    amax = shared_amax(module) if weights in FUSED_SCALE and module != "lm_head" else None
    return ct.encode(quantize(weights, weight, group=weight.shape[1] if group == -1 else group, amax=amax), activations)


def scheme(weights: Weights, activations: Activations, group: int, targets: tuple[str, ...] = ("Linear",)) -> Config:
    """One entry of `config_groups`; a group of -1 is a whole channel."""
    made: Config = ct.config(weights, activations, group)["config_groups"]["group_0"]
    if group == -1 and made["weights"]["strategy"] == "group":
        made["weights"] = {**made["weights"], "strategy": "channel", "group_size": None}
    return {**made, "targets": list(targets)}


def config(*schemes: Config, ignore: tuple[str, ...] = ("lm_head",), **more: Any) -> Config:
    """The `quantization_config` of these schemes."""
    formats = {one["format"] for one in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": one for number, one in enumerate(schemes)},
        **more,
    }


def of(weights: Weights, activations: Activations = "none", group: int = 128, **more: Any) -> Checkpoint:
    """All projections in one scheme of the suite."""
    encode = body(partial(tensors_of, weights, activations, group))
    return quantized(config(scheme(weights, activations, group), **more), encode)


def altered(one: Config, weights: Mapping[str, Any] | None = None, **more: Any) -> Config:
    """A scheme with other entries in its weights, and beside them."""
    return {**one, "weights": {**one["weights"], **(weights or {})}, **more}


def _mixed_groups() -> Checkpoint:
    schemes = (scheme("int4-sym", "none", 32, ("re:.*self_attn.*",)), scheme("int4-sym", "none", 128, ("re:.*mlp.*",)))
    encode = where(in_mlp, partial(tensors_of, "int4-sym", "none", 128), partial(tensors_of, "int4-sym", "none", 32))
    return quantized(config(*schemes), encode)


def _mixed_schemes() -> Checkpoint:
    schemes = (scheme("int4-sym", "none", 128, ("re:.*self_attn.*",)), scheme("int8-channel", "int8", -1, ("re:.*mlp.*",)))
    encode = where(in_mlp, partial(tensors_of, "int8-channel", "int8", -1), partial(tensors_of, "int4-sym", "none", 128))
    return quantized(config(*schemes), encode)


def _ignored(pattern: tuple[str, ...], ignored: Callable[[str], bool]) -> Checkpoint:
    encode = where(lambda module: not ignored(module), partial(tensors_of, "int4-sym", "none", 128))
    return quantized(config(scheme("int4-sym", "none", 128), ignore=("lm_head", *pattern)), encode)


def _act_order_group() -> Checkpoint:
    """`weight_g_idx` says each input's group, as GPTQ's `g_idx`."""

    def encode(module: str, weight: Array) -> Tensors:
        columns = weight.shape[1]
        order = np.argsort(np.random.Philox(key=columns).random_raw(columns), kind="stable")
        place = np.argsort(order, kind="stable")
        made = quantize("int4-sym", np.ascontiguousarray(weight[:, order]), group=128)
        codes = np.ascontiguousarray(made.codes[:, place])
        packed = ct.encode(replace(made, codes=codes), "none")
        return {**packed, "weight_g_idx": (place // 128).astype(np.int32)}

    one = altered(scheme("int4-sym", "none", 128), {"actorder": "group"})
    return quantized(config(one), body(encode))


def _static(zero_point: bool) -> Checkpoint:
    """INT8 of weights and activations, the latter with a scale from the checkpoint, and with a zero point."""

    def encode(module: str, weight: Array) -> Tensors:
        made = {**tensors_of("int8-channel", "int8", -1, module, weight), "input_scale": _INPUT_SCALE}
        return {**made, "input_zero_point": np.array([7], np.int8)} if zero_point else made

    inputs = {**_INT8_TENSOR, "symmetric": not zero_point}
    return quantized(config(altered(scheme("int8-channel", "int8", -1), input_activations=inputs)), body(encode))


def _w4a8() -> Checkpoint:
    """INT4 weights in bytes, one a byte, with INT8 activations."""

    def encode(module: str, weight: Array) -> Tensors:
        made = quantize("int4-sym", weight, group=128)
        return {"weight": made.codes, "weight_scale": made.scales.astype(ml_dtypes.bfloat16)}

    one = altered(scheme("int4-sym", "none", 128), input_activations=_INT8_TOKEN, format="int-quantized")
    return quantized(config(one), body(encode))


def _fp8_tensor() -> Checkpoint:
    """One scale for each projection, and one for its inputs."""

    def encode(module: str, weight: Array) -> Tensors:
        made = quantize("fp8-tensor", weight, group=0)  # a scale of its own, also in what engines fuse
        return {"weight": made.codes, "weight_scale": made.scales, "input_scale": _INPUT_SCALE}

    one = altered(scheme("fp8-channel", "fp8", -1), {"strategy": "tensor"}, input_activations=_FP8_TENSOR)
    return quantized(config(one), body(encode))


def _fp8_block() -> Checkpoint:
    def encode(module: str, weight: Array) -> Tensors:
        made = quantize("fp8-block", weight, group=0)
        return {"weight": made.codes, "weight_scale": made.scales}

    one = {**scheme("fp8-channel", "fp8", -1), "weights": {**_FP8_BLOCK, "dynamic": False}, "input_activations": _FP8_GROUP}
    return quantized(config(one), body(encode))


def kv_cache(scales: bool) -> Checkpoint:
    """An FP8 KV cache over INT4 weights, with scales of keys and values or without."""
    made = of("int4-sym", kv_cache_scheme=_KV_FP8)
    if not scales:
        return made
    places = {"k_scale": 0.05, "v_scale": 0.04}
    return made.with_tensors(
        {
            f"model.layers.{layer}.self_attn.{name}": np.array([value + layer / 128], np.float32)
            for layer in range(2)
            for name, value in places.items()
        }
    )


def _fp8_head() -> Checkpoint:
    schemes = (scheme("int8-channel", "int8", -1), scheme("fp8-channel", "fp8", -1, ("re:.*lm_head",)))
    int8, fp8 = partial(tensors_of, "int8-channel", "int8", -1), partial(tensors_of, "fp8-channel", "fp8", -1)
    encode: Encode = lambda module, weight: (fp8 if module == "lm_head" else int8)(module, weight)  # noqa: E731
    return quantized(config(*schemes, ignore=()), encode)


def two_of_four(weight: Array) -> Array:
    """`weight` with the two smaller of every four along its inputs set to zero."""
    fours = np.abs(weight.astype(np.float32)).reshape(-1, 4)
    keep = np.argsort(np.argsort(-fours, axis=1, kind="stable"), axis=1, kind="stable") < 2
    return np.where(keep, weight.reshape(-1, 4), np.zeros((), weight.dtype)).reshape(weight.shape)


def _sparse_declared() -> Checkpoint:
    """Plain weights, two of four zero, and a `sparsity_config` without quantization."""
    sparsity = {
        "format": "dense", "global_sparsity": 0.5, "ignore": ["lm_head"], "registry_requires_subclass": False,
        "sparsity_structure": "2:4", "targets": ["Linear"],
    }  # fmt: skip
    made = quantized(None, body(lambda module, weight: {"weight": two_of_four(weight)}))
    settings = {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense", "ignore": []}
    return made.configured(quantization_config={**settings, "sparsity_config": sparsity})


def _sparse_quantized() -> Checkpoint:
    """INT4 weights, two of four zero, which the configuration does not mention."""
    encode = body(lambda module, weight: tensors_of("int4-sym", "none", 128, module, two_of_four(weight)))
    return quantized(config(scheme("int4-sym", "none", 128)), encode)


def _experts() -> Checkpoint:
    routers = tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2))
    encode = body(partial(tensors_of, "int4-sym", "none", 128))
    return quantized(config(scheme("int4-sym", "none", 128), ignore=("lm_head", *routers)), encode, experts=True)


def _dynamic_asymmetric() -> Checkpoint:
    inputs = {**_INT8_TOKEN, "symmetric": False}
    one = altered(scheme("int8-channel", "int8", -1), input_activations=inputs)
    return quantized(config(one), body(partial(tensors_of, "int8-channel", "int8", -1)))


MADE: dict[str, Callable[[], Checkpoint]] = {
    "ct-w4a16-g32": partial(of, "int4-sym", group=32),
    "ct-w4a16-g128": partial(of, "int4-sym"),
    "ct-w4a16-channel": partial(of, "int4-sym", group=-1),
    "ct-w4a16-asym-g32": partial(of, "int4-asym", group=32),
    "ct-w4a16-asym-g128": partial(of, "int4-asym"),
    "ct-w8a16": partial(of, "int8-sym", group=-1),
    "ct-mixed-groups": _mixed_groups,
    "ct-mixed-schemes": _mixed_schemes,
    "ct-ignore-names": partial(_ignored, MLP_OF_0, lambda module: module in MLP_OF_0),
    "ct-ignore-pattern": partial(_ignored, (r"re:.*\.layers\.1\.mlp\..*",), lambda module: ".layers.1.mlp." in module),
    "ct-act-order-group": _act_order_group,
    "ct-act-order-weight": lambda: quantized(
        config(altered(scheme("int4-sym", "none", 128), {"actorder": "weight"})),
        body(partial(tensors_of, "int4-sym", "none", 128)),
    ),
    "ct-w8a8": partial(of, "int8-channel", "int8", -1),
    "ct-w8a8-azp": _dynamic_asymmetric,
    "ct-w8a8-static": partial(_static, False),
    "ct-w8a8-static-azp": partial(_static, True),
    "ct-w4a8": _w4a8,
    "ct-fp8-channel": partial(of, "fp8-channel", "fp8", -1),
    "ct-fp8-tensor-static": _fp8_tensor,
    "ct-fp8-block": _fp8_block,
    "ct-fp8-w8a16": partial(of, "fp8-channel", "none", -1),
    "ct-kv-fp8": partial(kv_cache, True),
    "ct-kv-fp8-no-scales": partial(kv_cache, False),
    "ct-fp8-head": _fp8_head,
    "ct-nvfp4": partial(of, "nvfp4", "fp4", 16),
    "ct-nvfp4-a16": partial(of, "nvfp4", "none", 16),
    "ct-mxfp4": partial(of, "mxfp4", "none", 32),
    "ct-mxfp8": partial(of, "mxfp8", "mxfp8", 32),
    "ct-sparse-declared": _sparse_declared,
    "ct-sparse-quantized": _sparse_quantized,
    "ct-experts": _experts,
}


def unscaled_inputs() -> Checkpoint:
    """Static activations without their scale in one projection."""
    return _static(False).without("model.layers.0.mlp.down_proj.input_scale")


def plain_under(settings: Config) -> Checkpoint:
    """Unquantized tensors beside this `quantization_config`."""
    return plain().configured(quantization_config=settings)
