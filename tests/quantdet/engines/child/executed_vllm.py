"""Which kernels a loaded vLLM model really uses, read from every layer.

Works by attribute names alone (vLLM 0.20 to 0.33), so that it imports neither vllm nor torch and can be tested on
plain objects. Kernels are chosen while the layers are created, so the walk is valid as soon as the engine is up; what
a kernel decides per call (for example by the number of rows) is not visible here.
"""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np

from quantdet.engines.child import executed_transformers
from quantdet.engines.child.stored import Stored
from quantdet.observations.header import Executed, Layer

NOTHING: Mapping[int, Stored] = MappingProxyType({})

# Where a quantization method or scheme keeps the object that multiplies, in order of preference.
_KERNEL_ATTRIBUTES = ("kernel", "fp8_linear", "linear_kernel")
# Choices inside a kernel that change its bits: CPU instruction set, INT8 activations, exllama's state, library path.
_DETAILS = ("isa_hint", "use_w4a8")
# Which implementation a method of experts has chosen, as an enum.
_EXPERT_BACKENDS = (
    "unquantized_backend", "wna16_moe_backend", "wna16_backend", "fp8_backend", "int8_backend", "nvfp4_backend",
    "mxfp4_backend",
)  # fmt: skip
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale")
_INSIDE = ".base_layer"  # of the name of a layer that another one wraps


def describe(model: Any, layers: Mapping[int, Stored] = NOTHING, dtype: str = "") -> Executed:
    """Walk `model.named_modules()` and count layers by module class, method, scheme, kernel, detail and what they hold.

    layers: by `id` of a module, what its parameters were loaded from. dtype: the model's, which a KV cache has by default.
    """
    alike: dict[tuple[tuple[str, str, str, str, str, str], Stored], list[str]] = {}
    attention: set[str] = set()
    caches: set[str] = set()
    for path, module in model.named_modules():
        name = path.replace(_INSIDE, "") or _name(module)
        method = _method(module)
        if method is not None and not _wraps(module):
            held = layers.get(id(module), Stored())
            shown = (_kind(name, module), _name(module), _name(method), *_kernel(module, method))
            alike.setdefault((shown, held), []).append(name)
        if hasattr(module, "attn_backend") and not _wraps(module):
            attention.add(_attention(module))
            caches |= _kv_cache(module, dtype)
    rows = sorted(alike.items(), key=lambda row: (row[0][0], repr(row[0][1])))
    return Executed(
        layers=tuple(
            Layer(
                kind=kind, module=module, method=method, scheme=scheme, kernel=kernel, detail=detail,
                count=len(names), names=tuple(names), **asdict(held),
            )
            for ((kind, module, method, scheme, kernel, detail), held), names in rows
        ),
        attention=tuple(sorted(attention)),
        kv_cache=tuple(sorted(caches)),
    )  # fmt: skip


def of_layer(path: str, module: Any) -> tuple[str, str]:
    """`(kind, what it executes)` of one module: attention, or a kind of `Layer`; ("", "") of any other module.

    Of vLLM's layers; of any other what `quantdet.engines.child.executed_transformers` says.
    """
    if hasattr(module, "attn_backend"):
        return "attention", _attention(module)
    method = _method(module)
    if method is None:
        return executed_transformers.of_layer(path, module)
    scheme, kernel, detail = _kernel(module, method)
    return _kind(path, module), (kernel or scheme or _name(method)) + (f"[{detail}]" if detail else "")


def _wraps(module: Any) -> bool:
    """Whether a module stands around one that is a layer itself, and is walked too (LoRA)."""
    inner = getattr(module, "base_layer", None)
    return getattr(inner, "quant_method", None) is not None or hasattr(inner, "attn_backend")


def _method(module: Any) -> Any:
    """How a layer multiplies. auto-round's own method holds a scheme, which holds the method that does it."""
    method = getattr(module, "quant_method", None)
    scheme = getattr(method, "scheme", None)
    inner = getattr(scheme, "linear_method", None) or getattr(scheme, "inner_method", None)  # the second up to vLLM 0.26
    return method if inner is None or callable(inner) else inner


def _name(thing: Any) -> str:
    return "" if thing is None else type(thing).__name__


def _kind(path: str, module: Any) -> str:
    name = _name(module)
    if "Embedding" in name or "LMHead" in name:
        return "embedding"
    if "Experts" in name or "MoE" in name:
        return "moe"
    if path.endswith(".gate"):  # of a mixture of experts; formats leave it unquantized
        return "router"
    return "linear" if "Linear" in name else "other"


def _kernel(module: Any, method: Any) -> tuple[str, str, str]:
    scheme = getattr(module, "scheme", None) or getattr(method, "scheme", None)  # of auto-round, where it has no method
    kernel, details = None, []
    for owner in (scheme, method):
        for attribute in _KERNEL_ATTRIBUTES:
            kernel = kernel or getattr(owner, attribute, None)
    for part in ("base", "fallback"):  # one layer, two kernels chosen per call (FP8 block on Hopper)
        inner = getattr(kernel, part, None)
        if inner is not None and not callable(inner):
            details.append(f"{part}={_name(inner)}")
    path = getattr(getattr(kernel, "linear_method", None), "__name__", "")
    if path:
        details.append(path.removeprefix("_apply_weights_"))
    for name in _DETAILS:
        value = getattr(module, name, None)
        if value is True:
            details.append(name.removeprefix("use_"))
        elif value not in (None, False, ""):
            details.append(str(value))
    moe = getattr(method, "moe_kernel", None)
    if moe is not None:
        kernel = getattr(moe, "fused_experts", None) or kernel
    for name in _EXPERT_BACKENDS:
        backend = getattr(method, name, None)
        if backend is not None:
            details.append(str(getattr(backend, "name", backend)).lower())
    weight = getattr(module, "weight", None)
    if weight is not None and "AO" in _name(method):  # torchao: the tensor subclass is the kernel
        details.append(f"weight={_name(weight)}")
    return _name(scheme), _name(kernel), ",".join(details)


def _attention(module: Any) -> str:
    backend = module.attn_backend
    name = backend.get_name() if hasattr(backend, "get_name") else _name(backend)
    version = getattr(getattr(module, "impl", None), "vllm_flash_attn_version", None)
    return f"{name}{f' FA{version}' if version else ''}"


def _kv_cache(module: Any, dtype: str) -> set[str]:
    """What an attention layer keeps keys and values in: dtype, and scales that are not 1. Empty: it does not say."""
    kept = getattr(module, "kv_cache_dtype", None)
    if not kept:
        return set()
    if kept == "auto":
        own = str(getattr(module, "kv_cache_torch_dtype", "")).removeprefix("torch.")
        kept = own or dtype or kept
    words = [{"fp8": "fp8_e4m3"}.get(str(kept), str(kept))]
    for scale in _CACHE_SCALES:
        value = _scale(module, f"_{scale}")
        if value not in ("", "1"):
            words.append(f"{scale} {value}")
    return {", ".join(words)}


def _scale(module: Any, name: str) -> str:
    """One scale of a cache: a number, or where each head has one, the least and the largest."""
    tensor: Any = getattr(module, name, None)
    if hasattr(tensor, "numel") and tensor.numel() > 1:
        low, high = _number(tensor.min()), _number(tensor.max())
        return low if low == high else f"{low} to {high}"
    value = getattr(module, f"{name}_float", None)
    return _number(value) if isinstance(value, int | float) else ""


def _number(value: Any) -> str:
    """A float32, with as many digits as tell it from every other one."""
    return str(np.float32(float(value))).removesuffix(".0")
