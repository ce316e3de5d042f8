"""compressed-tensors (https://github.com/vllm-project/compressed-tensors): five of its compression formats.

With W [N, K] and groups of g:
pack-quantized (int4, int8): `weight_packed` int32 [N, K * bits / 32] along K, value q + 2^(bits-1) where symmetric;
    `weight_scale` bfloat16 [N, K/g]; `weight_shape` int64 [2]; asymmetric: `weight_zero_point` int32 [N * bits / 32, K/g].
int-quantized (W8A8): `weight` int8 [N, K], `weight_scale` float32 [N, 1].
float-quantized (FP8): `weight` float8_e4m3fn [N, K], `weight_scale` float32 [N, 1].
nvfp4-pack-quantized: `weight_packed` uint8 [N, K/2], the even element in the low half; `weight_scale` float8_e4m3fn
    [N, K/16]; `weight_global_scale` float32 [1], a divisor; with activations `input_global_scale` float32 [1].
mxfp4-pack-quantized: `weight_packed` uint8 [N, K/2], `weight_scale` uint8 E8M0 [N, K/32].
mxfp8-quantized: `weight` float8_e4m3fn [N, K], `weight_scale` uint8 E8M0 [N, K/32].
"""

from typing import Any

import ml_dtypes
import numpy as np

from quantdet.checkpoints.layouts.packing import pack, pack_nibbles, unsigned
from quantdet.checkpoints.quantize import Quantized
from quantdet.checkpoints.rounding import FP4_MAX, FP8_MAX
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights

# The scale of NVFP4 activations is static and there is no calibration run: 64 is taken as their largest magnitude. The
# local float8 scales below it have 18 binary orders of range, so smaller activations keep their precision.
INPUT_AMAX = 64.0

_FORMATS: dict[Weights, str] = {
    "int4-sym": "pack-quantized",
    "int4-asym": "pack-quantized",
    "int8-sym": "pack-quantized",
    "int8-asym": "pack-quantized",
    "int8-channel": "int-quantized",
    "fp8-channel": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def encode(q: Quantized, activations: Activations) -> dict[str, Array]:
    """The tensors of one module in the format that belongs to its `weights` word."""
    match _FORMATS[q.weights]:
        case "pack-quantized":
            return _packed(q)
        case "nvfp4-pack-quantized":
            assert q.global_scale is not None
            tensors = {
                "weight_packed": pack_nibbles(q.codes),
                "weight_scale": q.scales,
                "weight_global_scale": np.array([q.global_scale], np.float32),
            }
            if activations != "none":
                tensors["input_global_scale"] = np.array([FP8_MAX * FP4_MAX / INPUT_AMAX], np.float32)
            return tensors
        case "mxfp4-pack-quantized":
            return {"weight_packed": pack_nibbles(q.codes), "weight_scale": q.scales}
        case _:
            return {"weight": q.codes, "weight_scale": q.scales}


def config(weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `quantization_config`."""
    scheme = {
        "targets": ["Linear"],
        "weights": _weights(weights, group),
        "input_activations": _activations(activations),
        "output_activations": None,
        "format": _FORMATS[weights],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[weights],
        "quantization_status": "compressed",
        "ignore": ["lm_head", *skipped],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme},
    }


def _packed(q: Quantized) -> dict[str, Array]:
    bits = 4 if q.weights.startswith("int4") else 8
    tensors = {
        "weight_packed": pack(unsigned(q.codes, bits), bits),
        "weight_scale": q.scales.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(q.codes.shape, np.int64),
    }
    if q.zero_points is not None:
        packed = pack(np.ascontiguousarray(q.zero_points.T), bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(packed.T)
    return tensors


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}


def _weights(weights: Weights, group: int) -> dict[str, Any]:
    match weights:
        case "int8-channel":
            return _arguments(8, "int", "channel")
        case "fp8-channel":
            return _arguments(8, "float", "channel")
        case "nvfp4":
            return _arguments(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
        case "mxfp4":
            return _arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        case "mxfp8":
            return _arguments(8, "float", "group", group_size=32, scale_dtype="torch.uint8")
    arguments = _arguments(4 if weights.startswith("int4") else 8, "int", "group", group_size=group)
    if weights.endswith("-asym"):
        arguments |= {"symmetric": False, "zp_dtype": "torch.int8"}
    return arguments


def _activations(activations: Activations) -> dict[str, Any] | None:
    match activations:
        case "int8":
            return _arguments(8, "int", "token") | {"dynamic": True}
        case "fp8":
            return _arguments(8, "float", "token") | {"dynamic": True}
        case "fp4":
            more = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn", "dynamic": "local"}
            return _arguments(4, "float", "tensor_group") | more
        case "mxfp8":
            return _arguments(8, "float", "group") | {"group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True}
    return None
