"""Which code multiplies in a model that transformers has loaded, read from every module.

Works by attribute names alone (transformers 5, bitsandbytes, torchao, compressed-tensors), so that it imports none of them and
can be tested on plain objects. Read after a first call: compressed-tensors unpacks its weights there.
"""

from collections import Counter
from typing import Any

from quantdet.observations.header import Executed, Layer


def describe(model: Any) -> Executed:
    """Walk `model.named_modules()` and count linear layers, experts, routers and embeddings by class, method and detail."""
    counts: Counter[tuple[str, ...]] = Counter()
    head = _head(model)
    for name, module in model.named_modules():
        kind = "embedding" if module is head else _kind(name, module)
        if kind:
            counts[(kind, type(module).__name__, *_executed(module, kind))] += 1
    layers = tuple(
        Layer(kind=kind, module=module, method=method, scheme=scheme, kernel=kernel, detail=detail, count=n)
        for (kind, module, method, scheme, kernel, detail), n in sorted(counts.items())
    )
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")
    return Executed(layers=layers, attention=(attention,) if attention else ())


def of_layer(path: str, module: Any) -> tuple[str, str]:
    """`(kind, what it executes)` of one module; ("", "") of one that multiplies by no weights."""
    kind = _kind(path, module)
    if not kind:
        return "", ""
    _, _, kernel, detail = _executed(module, kind)
    return kind, kernel + (f"[{detail}]" if detail else "")


def _head(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _kind(path: str, module: Any) -> str:
    name = type(module).__name__
    if name == "Embedding":
        return "embedding"
    if name.endswith("Experts"):
        return "moe"
    if path.endswith(".gate") or name.endswith("Router"):
        return "router"
    return "linear" if any("Linear" in base.__name__ for base in type(module).__mro__) else ""


def _executed(module: Any, kind: str) -> tuple[str, str, str, str]:
    """`(method, scheme, kernel, detail)`; the method of a module that nothing quantized begins with "Unquantized"."""
    name, weight = type(module).__name__, getattr(module, "weight", None)
    origin = type(module).__module__.partition(".")[0]
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:  # compressed-tensors: torch multiplies, in the model's dtype, what is unpacked before
        status = getattr(module, "quantization_status", None)
        details = [str(getattr(status, "value", status))]
        if (activations := getattr(scheme, "input_activations", None)) is not None:
            details.append(f"{activations.type}{activations.num_bits} simulated")
        return "compressed-tensors", str(getattr(scheme, "format", None) or ""), name, ",".join(details)
    if type(weight).__module__.partition(".")[0] == "torchao":  # the tensor subclass is the kernel
        return "torchao", "", type(weight).__name__, ""
    if origin == "bitsandbytes":
        words = [getattr(weight, "quant_type", ""), str(getattr(module, "compute_dtype", None) or "").removeprefix("torch.")]
        return "bitsandbytes", "", name, ",".join(filter(None, words))
    if kind == "moe":
        return name, "", name, str(getattr(getattr(module, "config", None), "_experts_implementation", None) or "")
    if origin == "torch" or not name.endswith("Linear"):
        return f"Unquantized{name}", "", name, ""
    return name, "", name, ""
