"""Which kernels a loaded vLLM model really uses, read from every layer.

Works by attribute names alone (vLLM 0.20 to 0.33), so that it imports neither vllm nor torch and can be tested on
plain objects. Kernels are chosen while the layers are created, so the walk is valid as soon as the engine is up; what
a kernel decides per call (for example by the number of rows) is not visible here.
"""

from collections import Counter
from typing import Any

from quantdet.engines.child import executed_transformers
from quantdet.observations.header import Executed, Layer

# Where a quantization method or scheme keeps the object that multiplies, in order of preference.
_KERNEL_ATTRIBUTES = ("kernel", "fp8_linear", "linear_kernel")
# Choices inside a kernel that change its bits: CPU instruction set, INT8 activations, exllama's state, library path.
_DETAILS = ("isa_hint", "use_w4a8")
# Which implementation a method of experts has chosen, as an enum.
_EXPERT_BACKENDS = (
    "unquantized_backend", "wna16_moe_backend", "wna16_backend", "fp8_backend", "int8_backend", "nvfp4_backend",
    "mxfp4_backend",
)  # fmt: skip


def describe(model: Any) -> Executed:
    """Walk `model.named_modules()` and count layers by module class, method, scheme, kernel and detail."""
    counts: Counter[tuple[str, str, str, str, str, str]] = Counter()
    attention: set[str] = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            counts[(_kind(name, module), _name(module), _name(method), *_kernel(module, method))] += 1
        if hasattr(module, "attn_backend"):
            attention.add(_attention(module))
    layers = tuple(
        Layer(kind=kind, module=module, method=method, scheme=scheme, kernel=kernel, detail=detail, count=n)
        for (kind, module, method, scheme, kernel, detail), n in sorted(counts.items())
    )
    return Executed(layers=layers, attention=tuple(sorted(attention)))


def of_layer(path: str, module: Any) -> tuple[str, str]:
    """`(kind, what it executes)` of one module: attention, or a kind of `Layer`; ("", "") of any other module.

    Of vLLM's layers; of any other what `quantdet.engines.child.executed_transformers` says.
    """
    if hasattr(module, "attn_backend"):
        return "attention", _attention(module)
    method = getattr(module, "quant_method", None)
    if method is None:
        return executed_transformers.of_layer(path, module)
    scheme, kernel, detail = _kernel(module, method)
    return _kind(path, module), (kernel or scheme or _name(method)) + (f"[{detail}]" if detail else "")


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
    scheme = getattr(module, "scheme", None)
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
