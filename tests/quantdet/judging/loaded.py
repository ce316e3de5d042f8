"""What else the loaded model shows beside its kernels: its KV cache, and what of the checkpoint was not used."""

from quantdet.observations.header import Header

# Words of vLLM for one dtype, beside the one that it is told by.
_ALIKE = {"fp8": ("fp8_e4m3",), "half": ("float16",), "float": ("float32",)}
_TOLD = 3  # names in a message


def kv_cache(header: Header) -> tuple[str, str]:
    """`(what is wrong with the KV cache, what there is to say of it)`, both empty where nothing is known or worth a word.

    A dtype that was asked for has to be what every layer has, but for layers that the engine was told to leave out.
    """
    found = () if header.executed is None else header.executed.kv_cache
    asked = str(header.engine_args.get("kv_cache_dtype") or "auto")
    if not found:
        return "", ""
    told = "; ".join(found[:_TOLD]) + (f"; ... ({len(found)} kinds)" if len(found) > _TOLD else "")
    if asked != "auto":
        right = [one for one in found if _dtype(one) in (asked, *_ALIKE.get(asked, ()))]
        if not right or (len(right) < len(found) and not header.engine_args.get("kv_cache_dtype_skip_layers")):
            return f"KV cache {asked} requested, executed {told}", ""
    return "", "" if set(found) <= {header.dtype, "auto"} else f"KV cache {told}"


def _dtype(kind: str) -> str:
    return kind.partition(",")[0]


def unused(header: Header) -> str:
    """How many tensors of the checkpoint filled nothing, and the first of them; empty where there are none.

    Where vLLM's layers are told by name and nobody saw what filled them: that. Older recordings have no names.
    """
    loading = header.loading
    if loading is None:
        new = header.engine == "vllm" and header.executed is not None and any(layer.names for layer in header.executed.layers)
        return "what filled its parameters was not seen: this vLLM loads them in another way" if new else ""
    if not loading.unused_count:
        return ""
    names = ", ".join(loading.unused[:_TOLD]) + (", ..." if loading.unused_count > _TOLD else "")
    count = loading.unused_count
    return f"{count} tensor{'s' if count > 1 else ''} of the checkpoint {'were' if count > 1 else 'was'} not used ({names})"


def figures(header: Header) -> dict[str, object]:
    """Tensors that filled nothing (how many, and the first), and parameters that nothing has to fill (by the reason)."""
    loading = header.loading
    if loading is None:
        return {}
    found: dict[str, object] = {}
    if loading.unused_count:
        found["checkpoint.unused"] = {"count": loading.unused_count, "first": ", ".join(loading.unused[:_TOLD])}
    if loading.by_rule:
        found["checkpoint.by_rule"] = {reason: len(names) for reason, names in loading.by_rule.items()}
    return found
