"""Whether the tensors of a quantized projection can be what its settings say: dtypes, shapes, groups, bit widths.

Shapes as in `layouts`, with W [N, K] (N outputs, K inputs). Nothing is said of what these settings do not fix, or of layouts
that are not known here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.rules import Rules
from quantdet.checkpoints.tensors import Array, word

Parts = Mapping[str, Array]  # the tensors of one module by local name

# A module that stores one of these is quantized.
MARKS = frozenset({"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "SCB"})
# What settings and shapes raise that do not fit each other; somebody else wrote both.
MISFITS = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, re.error, Unavailable)
_FP8 = ("F8_E4M3", "F8_E5M2")


def quantized(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The modules that store tensors of a quantized weight, each with its tensors by local name ("weight.absmax" too)."""
    found: dict[str, dict[str, Any]] = {}
    for name in tensors:
        parent, _, local = name.rpartition(".")
        if local in MARKS:
            found.setdefault(parent, {})
        elif local in ("absmax", "quant_map") and parent.endswith(".weight"):
            found.setdefault(parent.removesuffix(".weight"), {})
    for name, tensor in tensors.items():
        parent, _, local = name.rpartition(".")
        if parent not in found and parent.rpartition(".")[0] in found:  # bitsandbytes: weight.absmax
            parent, local = parent.rpartition(".")[0], f"{parent.rpartition('.')[2]}.{local}"
        if parent in found:
            found[parent][local] = tensor
    return found


def contradictions(rules: Rules, module: str, parts: Parts) -> list[str]:
    """What of a quantized module's tensors is not what the settings say, each in words; empty: nothing.

    Of the tensors' values only `g_idx` and `weight_shape` are read.
    """
    stored, method = stored_as(parts), rules.method
    check = _CHECKS.get(method)
    if check is None:
        return [f"is stored quantized ({stored or 'unknown'}), and no quant_method says how"] if not method else []
    if stored and stored not in _STORED[method]:
        return [f"is stored as {stored}, and the configuration says {method}"]
    try:
        return list(check(rules, module, parts))
    except MISFITS as error:
        return [f"does not fit its settings ({type(error).__name__}: {error})"[:200]]


def stored_as(parts: Parts) -> str:
    """The layout that a module's tensors have by their names and dtypes; "": none that is known."""
    dtypes = {local: word(array.dtype) for local, array in parts.items()}
    if "qweight" in parts and "scales" in parts:
        words, outputs = parts["qweight"].shape[-1], parts["scales"].shape[-1]
        if words == outputs:
            return "GPTQ (packed along the inputs)"
        return "AWQ (packed along the outputs)" if words * 8 == outputs else ""
    packed = dtypes.get("weight_packed")
    if packed == "I32":
        return "packed integers (weight_packed)"
    if packed == "U8":
        return "packed FP4 (weight_packed)"
    weight = dtypes.get("weight")
    if weight in _FP8 and ({"weight_scale", "weight_scale_inv"} & parts.keys()):
        return f"FP8 ({weight})"
    if weight == "I8":
        return "bitsandbytes int8 (SCB)" if "SCB" in parts else "int8"
    if weight == "U8":
        return "bitsandbytes 4-bit (absmax)" if "weight.absmax" in parts else "bytes of FP4 (weight)"
    return ""


def _missing(parts: Parts, *names: str) -> Iterator[str]:
    gone = [name for name in names if name not in parts]
    if gone:
        yield f"lacks {', '.join(gone)}"


def _unlike(name: str, array: Array, want: tuple[int, ...], why: str) -> Iterator[str]:
    if tuple(array.shape) != want:
        yield f"{name} is {list(array.shape)}, and {why} asks for {list(want)}"


def _groups(inputs: int, size: object) -> int | None:
    """Groups along K; None: the settings do not say."""
    if not isinstance(size, int) or isinstance(size, bool):
        return None
    return -(-inputs // size) if size > 0 else 1


def _gptq(rules: Rules, module: str, parts: Parts) -> Iterator[str]:
    own = rules.of(module)
    bits, size = int(own["bits"]), own.get("group_size")
    yield from _missing(parts, "qweight", "qzeros", "scales")
    if not {"qweight", "qzeros", "scales"} <= parts.keys():
        return
    qweight, qzeros, scales, index = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
    if not 0 < bits <= 8 or any(word(array.dtype) != "I32" for array in (qweight, qzeros)):
        yield f"{bits} bit in {word(qweight.dtype)}: need 2 to 8 bit in int32"
        return
    if index is not None and len(index) and qweight.shape[0] * 32 != len(index) * bits:
        told = qweight.shape[0] * 32 / len(index)
        yield f"qweight holds {told:g} bit for each of {len(index)} inputs, and the configuration says {bits}"
        return
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = _groups(inputs, size)
    words = -(-outputs * bits // 32)
    if qzeros.shape[1] != words:
        yield f"qzeros holds {qzeros.shape[1] * 32 / max(outputs, 1):g} bit for each output, and the configuration says {bits}"
    why = f"group_size {size} of {inputs} inputs at {bits} bit"
    if groups is not None:
        yield from _unlike("scales", scales, (groups, outputs), why)
        yield from _unlike("qzeros", qzeros, (groups, qzeros.shape[1]), why)
    yield from _index(own.get("desc_act") is True and size != -1, "g_idx", index, inputs, len(scales), "desc_act")


def _index(needed: bool, name: str, index: Array | None, inputs: int, groups: int, why: str) -> Iterator[str]:
    """`needed`: whether the settings say that inputs are in another order than that of their groups."""
    if index is None or not index.size:
        if needed:
            yield f"lacks {name}, and {why} asks for it"
        return
    yield from _unlike(name, index, (inputs,), f"a weight of {inputs} inputs")
    if int(index.min()) < 0 or int(index.max()) >= groups:
        yield f"{name} names group {int(index.max() if index.max() >= groups else index.min())}, and there are {groups}"
    elif not needed and groups and len(index) == inputs and np.any(np.diff(index.astype(np.int64)) < 0):
        yield f"{name} has inputs in another order than their groups', and the configuration does not say so ({why})"


def _awq(rules: Rules, module: str, parts: Parts) -> Iterator[str]:
    own = rules.of(module)
    bits = int(own.get("bits", own.get("w_bit", 4)))
    size = own.get("group_size", own.get("q_group_size"))
    needed = ("qweight", "scales", *(() if own.get("zero_point") is False or own.get("sym") is True else ("qzeros",)))
    yield from _missing(parts, *needed)
    if not set(needed) <= parts.keys():
        return
    qweight, scales = parts["qweight"], parts["scales"]
    inputs, outputs = qweight.shape[0], scales.shape[1]
    if qweight.shape[1] * 32 != outputs * bits:
        told = qweight.shape[1] * 32 / max(outputs, 1)
        yield f"qweight holds {told:g} bit for each output, and the configuration says {bits}"
    groups = _groups(inputs, size)
    if groups is not None:
        why = f"group_size {size} of {inputs} inputs"
        yield from _unlike("scales", scales, (groups, outputs), why)
        if "qzeros" in parts:
            yield from _unlike("qzeros", parts["qzeros"], (groups, qweight.shape[1]), why)


def _fp8(rules: Rules, module: str, parts: Parts) -> Iterator[str]:
    blocks = rules.settings.get("weight_block_size")
    weight = parts.get("weight")
    if weight is None or weight.ndim != 2:
        yield from _missing(parts, "weight")
        return
    if word(weight.dtype) != _FP8[0]:  # vLLM casts the other one, which holds larger numbers
        yield f"weight is {word(weight.dtype)}, and the configuration says FP8"
    scale = "weight_scale_inv" if blocks else "weight_scale"
    yield from _missing(parts, scale)
    if scale in parts and blocks:
        rows, columns = (int(size) for size in blocks)
        want = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        yield from _unlike(scale, parts[scale], want, f"weight_block_size {[rows, columns]} of {list(weight.shape)}")
    elif scale in parts and parts[scale].size != 1:
        yield f"{scale} is {list(parts[scale].shape)}, and the configuration has one scale for a tensor"
    if rules.settings.get("activation_scheme") == "static":
        yield from _missing(parts, "input_scale")


def _compressed_tensors(rules: Rules, module: str, parts: Parts) -> Iterator[str]:
    scheme = rules.scheme(module)
    form, weights = scheme.get("format") or rules.settings.get("format"), scheme["weights"]
    inputs = scheme.get("input_activations") or {}
    checks = {
        "pack-quantized": _packed, "int-quantized": _plain_codes, "float-quantized": _plain_codes,
        "naive-quantized": _plain_codes, "nvfp4-pack-quantized": _fp4, "mxfp4-pack-quantized": _fp4,
        "mxfp8-quantized": _plain_codes,
    }  # fmt: skip
    if form not in checks:
        return
    yield from checks[form](form, weights, parts)
    if inputs and inputs.get("dynamic", False) is False and form in ("int-quantized", "float-quantized", "naive-quantized"):
        yield from _missing(parts, "input_scale")
    if form == "nvfp4-pack-quantized" and inputs:
        yield from _missing(parts, "input_global_scale")


def _scale_shape(weights: Mapping[str, Any], rows: int, columns: int) -> tuple[tuple[int, ...] | None, str]:
    """Of a weight's scales, where its arguments say it; and these in words."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:  # as compressed-tensors takes it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    why = f"strategy {strategy}{f' {size}' if isinstance(size, int) and size > 0 else ''} of {[rows, columns]}"
    if strategy == "channel":
        return (rows, 1), why
    if strategy in ("group", "tensor_group"):
        groups = _groups(columns, size)
        return (None if groups is None else (rows, groups)), why
    if strategy == "block":
        high, wide = weights["block_structure"]
        return (-(-rows // int(high)), -(-columns // int(wide))), f"blocks of {[high, wide]} of {[rows, columns]}"
    return None, why


def _scale(weights: Mapping[str, Any], parts: Parts, rows: int, columns: int) -> Iterator[str]:
    yield from _missing(parts, "weight_scale")
    if "weight_scale" not in parts:
        return
    scale = parts["weight_scale"]
    if word(scale.dtype)[0] == "I":
        yield f"weight_scale is {word(scale.dtype)}, which is no dtype of scales"
        return
    want, why = _scale_shape(weights, rows, columns)
    if want is None:
        if weights.get("strategy", "tensor") == "tensor" and scale.size != 1:
            yield f"weight_scale is {list(scale.shape)}, and {why} asks for one"
    elif not (scale.ndim == 1 and want == (len(scale), 1)):
        yield from _unlike("weight_scale", scale, want, why)


def _packed(form: str, weights: Mapping[str, Any], parts: Parts) -> Iterator[str]:
    yield from _missing(parts, "weight_packed")
    if "weight_packed" not in parts:
        if "weight" in parts:
            yield f"weight is {word(parts['weight'].dtype)}, and format {form} asks for packed integers"
        return
    bits, packed = int(weights["num_bits"]), parts["weight_packed"]
    if word(packed.dtype) != "I32":
        yield f"weight_packed is {word(packed.dtype)}, and {form} asks for I32"
        return
    if packed.ndim != 2:
        return
    rows, per_word = packed.shape[0], 32 // bits
    columns = packed.shape[1] * per_word
    if "weight_shape" in parts:
        told = [int(size) for size in np.asarray(parts["weight_shape"]).reshape(-1)[:4]]
        if len(told) != 2 or told[0] != rows or -(-told[1] // per_word) != packed.shape[1]:
            yield f"weight_packed is {list(packed.shape)}, and weight_shape {told} at {bits} bit asks for another"
            return
        columns = told[1]
    yield from _scale(weights, parts, rows, columns)
    scale = parts.get("weight_scale")
    groups = 1 if scale is None or scale.ndim < 2 else scale.shape[1]
    if weights.get("symmetric", True) is False:
        yield from _missing(parts, "weight_zero_point")
    if "weight_zero_point" in parts and word(parts["weight_zero_point"].dtype) == "I32":
        want = (-(-rows // per_word), groups)
        yield from _unlike("weight_zero_point", parts["weight_zero_point"], want, f"{rows} outputs at {bits} bit")
    by_order = weights.get("actorder") is True or str(weights.get("actorder")).lower() in ("group", "dynamic")
    yield from _index(by_order, "weight_g_idx", parts.get("weight_g_idx"), columns, groups, "actorder")


def _plain_codes(form: str, weights: Mapping[str, Any], parts: Parts) -> Iterator[str]:
    yield from _missing(parts, "weight")
    if "weight" not in parts or parts["weight"].ndim != 2:
        if "weight_packed" in parts:
            yield f"weight_packed is {word(parts['weight_packed'].dtype)}, and format {form} asks for a plain weight"
        return
    weight, kind = parts["weight"], str(weights.get("type", "int")).lower()
    wanted = _FP8[:1] if kind == "float" else ("I8",)
    if word(weight.dtype) not in wanted:
        yield f"weight is {word(weight.dtype)}, and {form} of {weights.get('num_bits')}-bit {kind} asks for {wanted[0]}"
    yield from _scale(weights, parts, *weight.shape)


def _fp4(form: str, weights: Mapping[str, Any], parts: Parts) -> Iterator[str]:
    yield from _missing(parts, "weight_packed", *(("weight_global_scale",) if form.startswith("nvfp4") else ()))
    packed = parts.get("weight_packed")
    if packed is not None and packed.ndim == 2:
        if word(packed.dtype) != "U8":
            yield f"weight_packed is {word(packed.dtype)}, and {form} asks for U8"
        yield from _scale(weights, parts, packed.shape[0], packed.shape[1] * 2)


_CHECKS: dict[str, Callable[[Rules, str, Parts], Iterator[str]]] = {
    "gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed_tensors,
}  # fmt: skip
_STORED = {
    "gptq": ("GPTQ (packed along the inputs)",),
    "awq": ("AWQ (packed along the outputs)",),
    "fp8": ("FP8 (F8_E4M3)", "FP8 (F8_E5M2)"),
    "compressed-tensors": (
        "packed integers (weight_packed)", "packed FP4 (weight_packed)", "FP8 (F8_E4M3)", "FP8 (F8_E5M2)", "int8",
    ),
}  # fmt: skip
