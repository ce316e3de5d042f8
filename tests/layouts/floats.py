"""FP8 in vLLM's own layout, NVIDIA's modelopt and AMD's quark."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from layouts.checkpoint import Checkpoint, Encode, Tensors, as_json, body, plain, quantized, shared_amax, where
from layouts.integers import MLP_OF_0, awq_tensors
from quantdet.checkpoints.layouts import fp8
from quantdet.checkpoints.layouts.compressed_tensors import INPUT_AMAX
from quantdet.checkpoints.layouts.packing import pack_nibbles
from quantdet.checkpoints.quantize import quantize
from quantdet.checkpoints.rounding import FP4_MAX, FP8_MAX
from quantdet.checkpoints.tensors import Array

_SCALAR_INPUT = np.array(0.02, np.float32)


def _tensor(own: bool, static: bool, module: str, weight: Array) -> Tensors:
    """A scale for the whole projection: its own, or one for all that engines fuse with it."""
    made = quantize("fp8-tensor", weight, group=0, amax=None if own else shared_amax(module))
    tensors = fp8.encode(made, "fp8")
    return {**tensors, "input_scale": _SCALAR_INPUT} if static else tensors


def _block(module: str, weight: Array) -> Tensors:
    return fp8.encode(quantize("fp8-block", weight, group=0), "fp8")


def native(encode: Encode, word: str = "fp8-tensor", skipped: tuple[str, ...] = (), **more: Any) -> Checkpoint:
    """`quant_method: fp8`."""
    settings = fp8.config("fp8-block" if word == "fp8-block" else "fp8-tensor", "fp8", 0, skipped)
    return quantized({**settings, **more}, where(lambda module: module not in skipped, encode))


def _native_experts() -> Checkpoint:
    routers = tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2))
    settings = fp8.config("fp8-block", "fp8", 0, routers)
    return quantized(settings, body(_block), experts=True)


def _modelopt(settings: dict[str, Any], encode: Encode) -> Checkpoint:
    """modelopt writes what it did into a file of its own."""
    made = quantized(None, body(encode))
    content = {"producer": {"name": "modelopt", "version": "0.37.0"}, "quantization": settings}
    return Checkpoint(made.config, made.tensors, files={"hf_quant_config.json": as_json(content)})


def _nvfp4(module: str, weight: Array) -> Tensors:
    """`weight_scale_2` and `input_scale` multiply, where compressed-tensors' global scales divide."""
    made = quantize("nvfp4", weight, group=16, amax=shared_amax(module))
    assert made.global_scale is not None
    return {
        "weight": pack_nibbles(made.codes),
        "weight_scale": made.scales,
        "weight_scale_2": np.array(np.float32(1) / made.global_scale, np.float32),
        "input_scale": np.array(INPUT_AMAX / (FP8_MAX * FP4_MAX), np.float32),
    }


_MODELOPT_FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
_MODELOPT_NVFP4 = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def _modelopt_inside() -> Checkpoint:
    """The younger place: `quantization_config` of config.json."""
    settings = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    return quantized(settings, body(partial(_tensor, True, True)))


def _quark(weight: dict[str, Any], inputs: dict[str, Any] | None, encode: Encode) -> Checkpoint:
    common = {"observer_cls": "PerTensorMinMaxObserver", "round_method": "half_even", "scale_type": "float"}
    weight, inputs = {**common, **weight}, None if inputs is None else {**common, **inputs}
    settings = {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "algo_config": None,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }
    return quantized(settings, body(encode))


def _quark_fp8() -> Checkpoint:
    one = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
    return _quark(one, one, partial(_tensor, True, True))


def _quark_int8() -> Checkpoint:
    weight = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True}
    inputs = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True, "symmetric": True}

    def encode(module: str, w: Array) -> Tensors:
        made = quantize("int8-channel", w, group=0)
        scales = made.scales.reshape(-1)
        return {"weight": made.codes, "weight_scale": scales, "weight_zero_point": np.zeros(scales.shape, np.int8)}

    return _quark(weight, inputs, encode)


def _quark_int4() -> Checkpoint:
    weight = {
        "dtype": "uint4", "qscheme": "per_group", "group_size": 128, "ch_axis": 1, "is_dynamic": False, "symmetric": False,
    }  # fmt: skip

    def encode(module: str, w: Array) -> Tensors:
        made = awq_tensors(128, module, w)
        return {"weight": made["qweight"], "weight_scale": made["scales"], "weight_zero_point": made["qzeros"]}

    return _quark(weight, None, encode)


MADE: dict[str, Callable[[], Checkpoint]] = {
    "fp8-tensor": lambda: native(partial(_tensor, False, False)),
    "fp8-tensor-static": lambda: native(partial(_tensor, True, True), activation_scheme="static"),
    "fp8-block": lambda: native(_block, "fp8-block"),
    "fp8-ignored": lambda: native(_block, "fp8-block", MLP_OF_0),
    "fp8-experts": _native_experts,
    "modelopt-fp8": lambda: _modelopt(_MODELOPT_FP8, partial(_tensor, True, True)),
    "modelopt-fp8-inside": _modelopt_inside,
    "modelopt-nvfp4": lambda: _modelopt(_MODELOPT_NVFP4, _nvfp4),
    "quark-fp8": _quark_fp8,
    "quark-int8": _quark_int8,
    "quark-int4": _quark_int4,
}


def plain_under_fp8() -> Checkpoint:
    """Unquantized tensors beside the configuration of FP8: vLLM takes it for quantization while loading."""
    return plain().configured(quantization_config=fp8.config("fp8-tensor", "fp8", 0))
