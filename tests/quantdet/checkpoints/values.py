"""Values that no whole checkpoint holds: NaN and infinities, scales of zero, zero points that a symmetric kernel ignores."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from quantdet.checkpoints.decoding import unpacked
from quantdet.checkpoints.rules import Rules
from quantdet.checkpoints.tensors import Array, word

_PIECE = 1 << 22  # elements at a time: no copy is large
# By dtype: integers to look at them as, what to mask, and from where on masked bits are no finite number. The sign is masked;
# E4M3 (fn) has one code of NaN and no infinity; E8M0 has no sign.
_EXPONENTS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000), "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F16": ("<u2", 0x7FFF, 0x7C00), "BF16": ("<u2", 0x7FFF, 0x7F80), "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E5M2": ("u1", 0x7F, 0x7C), "F8_E8M0": ("u1", 0xFF, 0xFF),
}  # fmt: skip
_SCALES = frozenset({
    "weight_scale", "scales", "weight_scale_inv", "weight_global_scale", "weight_scale_2", "input_scale", "input_global_scale",
    "k_scale", "v_scale", "q_scale", "kv_scale", "nested_absmax",
})  # fmt: skip


def not_finite(array: Array) -> str:
    """What of a floating tensor is no finite number, in words; "": nothing, or it is no floating tensor."""
    known = _EXPONENTS.get(word(array.dtype))
    if known is None or not array.size:
        return ""
    integers, mask, first = known
    count, at = 0, -1
    for start, piece in _pieces(array.view(integers)):
        masked = piece & piece.dtype.type(mask)
        if masked.max() >= first:
            found = np.flatnonzero(masked >= first)
            at = start + int(found[0]) if at < 0 else at
            count += len(found)
    return f"NaN or infinity in {count} of {array.size} values, first at {at}" if count else ""


def e8m0_nan(module: Mapping[str, Array]) -> str:
    """The same of scales that are exponents (E8M0) stored as bytes: 255 is NaN."""
    scales = module.get("weight_scale")
    if scales is None or word(scales.dtype) != "U8" or not scales.size:
        return ""
    count = sum(int(np.count_nonzero(piece == 255)) for _, piece in _pieces(scales))
    return f"NaN (E8M0 255) in {count} of {scales.size} scales" if count else ""


def zero_scales(local: str, array: Array, module: Mapping[str, Array]) -> str:
    """What is wrong with a tensor of scales that holds zeros, in words; "": nothing, or it is none of scales.

    Zeros that are right: of a narrow local scale below a global one (a group of small weights underflows), and of
    bitsandbytes, where all of a row's or block's codes are one value (it was all zeros).
    """
    kind = word(array.dtype)
    if kind not in _EXPONENTS or kind == "F8_E8M0" or not array.size:
        return ""
    if local not in _SCALES and local not in ("SCB", "weight.absmax", "weight.nested_absmax"):
        return ""
    zeros = np.concatenate([piece == 0 for _, piece in _pieces(_magnitudes(array))])
    if local == "SCB" and (weight := module.get("weight")) is not None and weight.ndim == 2 and len(weight) == len(zeros):
        zeros &= [bool(zero) and bool(np.any(row)) for row, zero in zip(weight, zeros, strict=True)]
    if local == "weight.absmax":
        zeros = _live_blocks(zeros, module.get("weight"))
    count = int(np.count_nonzero(zeros))
    if kind.startswith("F8") and count < array.size:
        return ""
    return f"{count} of {array.size} scales are zero" if count else ""


def out_of_range(rules: Rules, module: str, parts: Mapping[str, Array]) -> str:
    """Integers of fewer bits that are stored as int8 (compressed-tensors), outside of what these bits hold; "": none."""
    weight = parts.get("weight")
    if rules.method != "compressed-tensors" or weight is None or word(weight.dtype) != "I8":
        return ""
    scheme = rules.scheme(module)
    asked = scheme.get("weights") if scheme is not None else None
    bits = asked.get("num_bits") if isinstance(asked, Mapping) else None
    if not isinstance(bits, int) or not 0 < bits < 8:
        return ""
    half = 1 << (bits - 1)
    count = sum(int(np.count_nonzero((piece < -half) | (piece >= half))) for _, piece in _pieces(weight))
    return f"{count} of {weight.size} integers are outside of {bits} bits" if count else ""


def ignored_zero_points(rules: Rules, module: str, parts: Mapping[str, Array]) -> str:
    """Whether zero points are stored that are not in the middle, and the settings say that they are (symmetric)."""
    if rules.method == "gptq":
        own = rules.of(module)
        if own.get("sym") is not True or "qzeros" not in parts:
            return ""
        bits = int(own["bits"])
        middle = 2 ** (bits - 1) - (own.get("checkpoint_format", "gptq") != "gptq_v2")
        zeros = unpacked(parts["qzeros"], bits)[:, : parts["qweight"].shape[1]]
    elif rules.method == "compressed-tensors" and "weight_packed" in parts and "weight_zero_point" in parts:
        weights = rules.scheme(module)["weights"]
        if weights.get("symmetric", True) is not True or word(parts["weight_zero_point"].dtype) != "I32":
            return ""
        bits = int(weights["num_bits"])
        middle = 2 ** (bits - 1)
        zeros = unpacked(np.ascontiguousarray(parts["weight_zero_point"].T), bits)[:, : parts["weight_packed"].shape[0]]
    elif rules.method == "awq" and "qzeros" in parts:
        own = rules.of(module)
        bits = int(own.get("bits", own.get("w_bit", 4)))
        if own.get("zero_point", True) is not False or bits != 4:
            return ""
        middle, zeros = 8, unpacked(parts["qzeros"], bits)  # in whichever order
    else:
        return ""
    count = int(np.count_nonzero(zeros != middle))
    return f"{count} of {zeros.size} zero points are not in the middle, and the configuration says symmetric" if count else ""


def _magnitudes(array: Array) -> Array:
    """The bits without the sign: zero is zero of either sign. Of scales, which are few."""
    integers, mask, _ = _EXPONENTS[word(array.dtype)]
    bits = array.reshape(-1).view(integers)
    return np.asarray(bits & bits.dtype.type(mask))


def _live_blocks(zeros: Array, weight: Array | None) -> Array:
    """`zeros` of blocks whose packed codes are not all the same."""
    if weight is None or weight.size % max(len(zeros), 1) or not zeros.any():
        return zeros
    blocks = weight.reshape(len(zeros), -1)
    found = np.flatnonzero(zeros)
    zeros[found] = (blocks[found] != blocks[found, :1]).any(axis=1)
    return zeros


def _pieces(array: Array) -> Iterator[tuple[int, Any]]:
    flat = array.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        yield start, flat[start : start + _PIECE]
