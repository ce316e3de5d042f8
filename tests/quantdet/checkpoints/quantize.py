"""Round-to-nearest quantizers: a float32 weight in, integer codes and scales out. No calibration, no layout.

Every quantizer takes some rows of `w` in float32, [n, K] of [N, K] (N outputs, K inputs), and groups run along K. Only
correctly rounded IEEE operations are used (no BLAS, no logarithm), so the numbers are the same on every machine. The same
`weights` word gives the same numbers whatever the layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.rounding import FP4_MAX, FP8_MAX, to_fp4, to_fp8
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Weights

BLOCK = 128  # rows and columns of a block-quantized FP8 tile
NF4_BLOCK = 64

_FLOATS = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
_CHUNK = 2**16  # weights at a time
_NOT_FINITE = "a weight to quantize holds NaN or infinity"

# The sixteen quantiles of NF4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E), as float32.
NF4_CODE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

# Words whose group size the model chooses.
GROUPED: frozenset[Weights] = frozenset({"int4-sym", "int4-asym", "int8-sym", "int8-asym"})

# Words whose tensor-wide scale is shared by the projections that an engine fuses into one matrix.
FUSED_SCALE: frozenset[Weights] = frozenset({"fp8-tensor", "nvfp4"})


@dataclass(frozen=True)
class Quantized:
    """A quantized weight [N, K].

    codes: [N, K]. int8 for symmetric integers (value = code), uint8 for asymmetric ones, float8_e4m3fn for fp8 and mxfp8,
        uint8 e2m1 codes (sign << 3 | magnitude) for nvfp4 and mxfp4, uint8 indices into `NF4_CODE` for nf4.
    scales: float32 [N, K/group], [N, 1] (channel), [1] (tensor), [ceil(N/128), ceil(K/128)] (block) or [N*K/64] (nf4);
        float8_e4m3fn [N, K/16] for nvfp4; uint8 E8M0 exponents [N, K/32] for mxfp4 and mxfp8.
    zero_points: uint8 [N, K/group] of the asymmetric sets.
    global_scale: nvfp4 only; float32 divisor: weight = code * scale / global_scale.
    """

    weights: Weights
    codes: Array
    scales: Array
    group: int | None = None
    zero_points: Array | None = None
    global_scale: np.float32 | None = None


def quantize(weights: Weights, w: Array, *, group: int, amax: np.float32 | None = None) -> Quantized:
    """Quantize `w` (float32, bfloat16 or float16 [N, K]) into the numbers that the word `weights` means.

    `group` is used by the grouped integer sets only; `amax` replaces the largest magnitude of `w` where one scale covers
    the whole tensor (`FUSED_SCALE`), so that fused projections can share it.

    Raises:
        Unavailable: the shape cannot be cut into the format's groups, or nothing here makes this word.
        ValueError: a weight that is not finite.
    """
    if w.ndim != 2 or w.dtype not in _FLOATS:
        raise ValueError(f"a weight to quantize is float32, bfloat16 or float16 [N, K], got {w.dtype} {list(w.shape)}")
    if weights not in _QUANTIZERS:
        raise Unavailable(f"weights {weights!r}: need a quantizer, have none for this word")
    shape = w.shape
    if weights == "nf4":
        if w.size % NF4_BLOCK:
            raise Unavailable(f"NF4 blocks: need a multiple of {NF4_BLOCK} weights, have {w.size}")
        w = w.reshape(-1, NF4_BLOCK)
    if weights in FUSED_SCALE and amax is None:
        amax = largest(w)
    if amax is not None and not np.isfinite(amax):
        raise ValueError(_NOT_FINITE)
    codes, parts, done = np.empty(w.shape, np.uint8), [], 0
    for rows in _row_blocks(w, BLOCK if weights == "fp8-block" else None):
        if not (np.isfinite(rows.max()) and np.isfinite(rows.min())):
            raise ValueError(_NOT_FINITE)
        parts.append(_QUANTIZERS[weights](rows, group, amax))
        codes[done : done + len(rows)] = parts[-1].codes.view(np.uint8)
        done += len(rows)
    return replace(
        parts[0],
        codes=codes.view(parts[0].codes.dtype).reshape(shape),
        scales=parts[0].scales if weights == "fp8-tensor" else np.concatenate([part.scales for part in parts]),
        zero_points=_concatenated([part.zero_points for part in parts]),
    )


def largest(w: Array) -> np.float32:
    """max |w|, without a copy of `w`; NaN if `w` holds one."""
    found = np.float32(0)
    for rows in _row_blocks(w, None):
        found = np.maximum(found, np.maximum(rows.max(), -rows.min()))
    return np.float32(found)


def _row_blocks(w: Array, rows: int | None) -> Iterator[Array]:
    """`w` as contiguous float32, some rows at a time: no temporary is larger than the processor's cache.

    Every number depends on its row (or its 128 rows) alone, so the blocks do not change it.
    """
    step = rows or max(1, _CHUNK // w.shape[1])
    for start in range(0, len(w), step):
        yield np.ascontiguousarray(w[start : start + step], np.float32)


def _concatenated(parts: list[Array | None]) -> Array | None:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None


def round_to_scale(scale: Array) -> Array:
    """`scale` (float32) rounded to bfloat16 inside float16's normal range, as float32.

    8 significant bits between 2^-14 and 65280 are exact in float16 and in bfloat16: layouts with scales of either dtype
    then carry the same number.
    """
    rounded = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(rounded, np.float32(2**-14), np.float32(65280.0))


def _by_group(w: Array, group: int, operation: np.ufunc) -> Array:
    """np.maximum or np.minimum over groups along the rows: [N, K] -> [N, K/group]."""
    rows, columns = w.shape
    if columns % group:
        raise Unavailable(f"groups of {group} along the input dimension: need a multiple of {group}, have {columns}")
    x = w.reshape(-1)
    # All groups at once, pair by pair: NumPy's reduction over a short last axis is ten times slower. Groups are 2^n.
    while group > 1:
        x = operation(x[0::2], x[1::2])
        group //= 2
    return x.reshape(rows, -1)


def _group_amax(w: Array, group: int) -> Array:
    return _by_group(np.abs(w), group, np.maximum)


def _divided(w: Array, scales: Array) -> Array:
    """w / scales, a scale for each group along the rows."""
    spread = np.repeat(scales.reshape(-1), w.size // scales.size).reshape(w.shape)
    return np.asarray(np.divide(w, spread, out=spread))


def _row_amax(w: Array) -> Array:
    return np.asarray(np.maximum(w.max(axis=1), -w.min(axis=1))[:, None])


def _nonzero(scale: Array) -> Array:
    return np.where(scale > 0, scale, np.float32(1.0))


def _integers(x: Array, low: int, high: int, dtype: type) -> Array:
    np.rint(x, out=x)
    np.clip(x, low, high, out=x)
    return x.astype(dtype)


def _symmetric(w: Array, group: int, _amax: np.float32 | None, *, bits: int) -> Quantized:
    """s = round_to_scale(max|w| / (2^(b-1) - 1)), q = clip(rint(w / s), -2^(b-1), 2^(b-1) - 1)."""
    top = 2 ** (bits - 1) - 1
    scales = round_to_scale(_group_amax(w, group) / np.float32(top))
    codes = _integers(_divided(w, scales), -top - 1, top, np.int8)
    return Quantized("int4-sym" if bits == 4 else "int8-sym", codes, scales, group)


def _asymmetric(w: Array, group: int, _amax: np.float32 | None, *, bits: int) -> Quantized:
    """s = round_to_scale((max - min) / (2^b - 1)) with min <= 0 <= max, z = clip(rint(-min / s)), q = clip(rint(w / s) + z)."""
    top = 2**bits - 1
    high = np.maximum(_by_group(w, group, np.maximum), np.float32(0))
    low = np.minimum(_by_group(w, group, np.minimum), np.float32(0))
    scales = round_to_scale((high - low) / np.float32(top))
    zeros = np.clip(np.rint(-low / scales), 0, top)
    x = _divided(w, scales)
    np.rint(x, out=x)
    x += np.repeat(zeros.reshape(-1), group).reshape(w.shape)
    codes = _integers(x, 0, top, np.uint8)
    word: Weights = "int4-asym" if bits == 4 else "int8-asym"
    return Quantized(word, codes, scales, group, zeros.astype(np.uint8))


def _int8_channel(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Per output row: float32 s = max|w| / 127, q = clip(rint(w / s), -127, 127)."""
    scales = _nonzero(_row_amax(w) / np.float32(127))
    return Quantized("int8-channel", _integers(w / scales, -127, 127, np.int8), scales)


def _bnb_int8(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """LLM.int8(): per output row SCB = max|w| (float32), q = rint(w * 127 / SCB); weight = q * SCB / 127."""
    scales = _row_amax(w)
    return Quantized("bnb-int8", _integers(w * (np.float32(127) / _nonzero(scales)), -127, 127, np.int8), scales)


def _fp8_tensor(w: Array, _group: int, amax: np.float32 | None) -> Quantized:
    """One float32 s = max|w| / 448; q = float8_e4m3fn(w / s)."""
    scales = _nonzero(np.array([amax], np.float32) / np.float32(FP8_MAX))
    return Quantized("fp8-tensor", to_fp8(w / scales), scales)


def _fp8_channel(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Per output row: float32 s = max|w| / 448; q = float8_e4m3fn(w / s)."""
    scales = _nonzero(_row_amax(w) / np.float32(FP8_MAX))
    return Quantized("fp8-channel", to_fp8(w / scales), scales)


def _fp8_block(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Per 128 x 128 tile, the last ones cut off at the edges: float32 s = max|w| / 448; q = float8_e4m3fn(w / s).

    `w` is one row of tiles.
    """
    columns = np.arange(0, w.shape[1], BLOCK)
    amax = np.maximum.reduceat(np.maximum(w.max(axis=0), -w.min(axis=0)), columns)
    scales = _nonzero(amax / np.float32(FP8_MAX))
    codes = to_fp8(w / np.repeat(scales, BLOCK)[: w.shape[1]])
    return Quantized("fp8-block", codes, scales[None])


def _nvfp4(w: Array, _group: int, amax: np.float32 | None) -> Quantized:
    """G = 448 * 6 / max|w|; per 16: s = float8_e4m3fn(max|w| / 6 * G), q = float4_e2m1fn(w / (s / G))."""
    assert amax is not None
    scale = np.float32(FP8_MAX * FP4_MAX) / (amax if amax > 0 else np.float32(1))
    exact = _group_amax(w, 16) / np.float32(FP4_MAX) * scale
    scales = to_fp8(np.clip(exact, np.float32(2**-9), np.float32(FP8_MAX)))
    codes = to_fp4(_divided(w, scales.astype(np.float32) / scale))
    return Quantized("nvfp4", codes, scales, 16, global_scale=scale)


def _exponents(amax: Array, largest_exponent: int) -> tuple[Array, Array]:
    """E8M0 exponents floor(log2(amax)) - `largest_exponent` + 127 and the powers of two they mean (OCP MX, 6.3)."""
    _, exponent = np.frexp(amax)  # amax = m * 2^exponent, 0.5 <= m < 1
    biased = np.clip(exponent.astype(np.int32) - 1 - largest_exponent + 127, 1, 254)
    return biased.astype(np.uint8), (biased.astype(np.uint32) << np.uint32(23)).view(np.float32)


def _mxfp4(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Per 32: s = 2^(floor(log2(max|w|)) - 2), q = float4_e2m1fn(w / s), saturating (OCP MX v1.0)."""
    scales, powers = _exponents(_group_amax(w, 32), 2)
    return Quantized("mxfp4", to_fp4(_divided(w, powers)), scales, 32)


def _mxfp8(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Per 32: s = 2^(floor(log2(max|w|)) - 8), q = float8_e4m3fn(w / s), saturating (OCP MX v1.0)."""
    scales, powers = _exponents(_group_amax(w, 32), 8)
    return Quantized("mxfp8", to_fp8(_divided(w, powers)), scales, 32)


def _nf4(w: Array, _group: int, _amax: np.float32 | None) -> Quantized:
    """Blocks of 64 in row-major order, the rows of `w`: s = max|w|, q = nearest `NF4_CODE` to w / s (ties to the lower)."""
    scales = _group_amax(w, NF4_BLOCK)
    x = _divided(w, _nonzero(scales))
    codes = np.zeros(w.shape, np.uint8)
    for middle in (NF4_CODE[1:] + NF4_CODE[:-1]) / np.float32(2):
        codes += (x > middle).view(np.uint8)  # fifteen such passes take a tenth of one binary search for each weight
    return Quantized("nf4", codes, scales.reshape(-1), NF4_BLOCK)


_QUANTIZERS: dict[Weights, Callable[[Array, int, np.float32 | None], Quantized]] = {
    "int4-sym": partial(_symmetric, bits=4),
    "int4-asym": partial(_asymmetric, bits=4),
    "int8-sym": partial(_symmetric, bits=8),
    "int8-asym": partial(_asymmetric, bits=8),
    "int8-channel": _int8_channel,
    "fp8-tensor": _fp8_tensor,
    "fp8-channel": _fp8_channel,
    "fp8-block": _fp8_block,
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "mxfp8": _mxfp8,
    "nf4": _nf4,
    "bnb-int8": _bnb_int8,
}
