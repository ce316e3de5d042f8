"""Quark's and ModelOpt's projections in the words of compressed-tensors, where both mean the same numbers.

Quark (`quant_method: quark`): FP8 and INT8 by tensor or channel. ModelOpt (`quant_algo`): FP8 by tensor, by channel and token,
and NVFP4, whose scale of a tensor is a multiplier where compressed-tensors has a divisor. What these are in the tensors is
read off vLLM (`quantization/quark`, `quantization/modelopt.py`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantdet.checkpoints.rules import Rules, modelopt
from quantdet.checkpoints.tensors import Array

_Translated = tuple[dict[str, Any], dict[str, Array]]

_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FP8 = {"num_bits": 8, "type": "float"}


def as_compressed_tensors(rules: Rules, parts: Mapping[str, Array]) -> _Translated:
    """A group of compressed-tensors' configuration, and the tensors of one module as it has them.

    Raises:
        ValueError and others of `shapes.MISFITS`: compressed-tensors does not have these numbers, or they are not known here.
    """
    return _quark(rules, parts) if rules.method == "quark" else _modelopt(rules, parts)


def kv_cache(method: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the KV cache is quantized, in compressed-tensors' arguments; None: it is not.

    Raises:
        ValueError: in a way that is not known here.
    """
    if method == "quark":
        if (settings.get("export") or {}).get("kv_cache_group"):
            raise ValueError("a quantized KV cache")
        return None
    own = modelopt(settings)
    asked = own.get("kv_cache_quant_algo") if method == "modelopt" else None
    if asked is not None and str(asked).upper() != "FP8":
        raise ValueError(f"KV cache {asked!r}")
    scheme = own.get("kv_cache_scheme")
    if asked is not None and not isinstance(scheme, dict):
        return {**_FP8, "strategy": "tensor", "dynamic": False}
    return scheme if isinstance(scheme, dict) else None


def _quark(rules: Rules, parts: Mapping[str, Array]) -> _Translated:
    settings = rules.settings
    if settings.get("layer_quant_config") or settings.get("layer_type_quant_config"):
        raise ValueError("settings of single modules")
    asked = settings["global_quant_config"]
    if asked.get("output_tensors") or asked.get("bias"):
        raise ValueError("quantized outputs or biases")
    weights = _quark_arguments(asked["weight"], "channel")
    inputs = asked.get("input_tensors")
    activations = None if not inputs else _quark_arguments(inputs, "token")
    if weights["dynamic"] or weights["strategy"] == "token":
        raise ValueError("weights that are quantized while they run")
    return _group(weights, activations), _columns(parts)


def _quark_arguments(asked: Mapping[str, Any], channel: str) -> dict[str, Any]:
    kinds = {"fp8_e4m3": "float", "int8": "int"}
    strategies = {"per_tensor": "tensor", "per_channel": channel}
    return {
        "num_bits": 8,
        "type": kinds[str(asked["dtype"]).lower()],
        "strategy": strategies[str(asked["qscheme"]).lower()],
        "dynamic": bool(asked.get("is_dynamic", False)),
        "symmetric": asked.get("symmetric"),
    }


def _modelopt(rules: Rules, parts: Mapping[str, Array]) -> _Translated:
    algorithm = str(rules.settings.get("quant_algo")).upper()
    by_tensor = {**_FP8, "strategy": "tensor", "dynamic": False}
    match algorithm:
        case "FP8":
            return _group(by_tensor, by_tensor), _columns(parts)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return _group({**_FP8, "strategy": "channel"}, {**_FP8, "strategy": "token", "dynamic": True}), _columns(parts)
        case "NVFP4" | "W4A16_NVFP4":
            activations = {**_NVFP4, "dynamic": "local"} if algorithm == "NVFP4" else None
            group = {"weights": _NVFP4, "input_activations": activations, "format": "nvfp4-pack-quantized"}
            tensors = dict(parts)
            made = {"weight_packed": tensors.pop("weight"), "weight_scale": tensors.pop("weight_scale")}
            made["weight_global_scale"] = _divisor(tensors.pop("weight_scale_2"))
            if activations:
                made["input_global_scale"] = _divisor(tensors.pop("input_scale"))
            return group, {**made, **tensors}
    raise ValueError(f"quant_algo {algorithm}")


def _group(weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    form = "float-quantized" if weights["type"] == "float" else "int-quantized"
    return {"weights": weights, "input_activations": activations, "format": form}


def _columns(parts: Mapping[str, Array]) -> dict[str, Array]:
    """One scale for each output as a column; zero points that are all zero are none."""
    tensors = dict(parts)
    scale = tensors["weight_scale"]
    tensors["weight_scale"] = scale.reshape(-1, 1) if scale.ndim == 1 else scale
    for local in ("weight_zero_point", "input_zero_point"):
        if local in tensors and not np.any(tensors[local]):
            del tensors[local]
    return tensors


def _divisor(multiplier: Array) -> Array:
    """1 / `multiplier` as float32 [1], if dividing by it is multiplying by `multiplier`, to the bit, as vLLM does it.

    Raises:
        ValueError: it is not: compressed-tensors has no such number.
    """
    one = np.float32(1)
    found = one / multiplier.astype(np.float32).reshape(-1)
    if found.size != 1 or not np.isfinite(found).all() or (one / found) != multiplier.astype(np.float32).reshape(-1):
        raise ValueError("a scale that no divisor gives")
    return np.asarray(found)
