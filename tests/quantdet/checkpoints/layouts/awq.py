"""AWQ "gemm" (AutoAWQ): 4 bit, asymmetric, packed along the output dimension in AWQ's interleaved order.

Per module, with W [N, K] and groups of g: `qweight` int32 [K, N/8], `qzeros` int32 [K/g, N/8], `scales` float16 [K/g, N];
w = (q - z) * s. Nibble i of a word holds column 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
(AutoAWQ, `awq/modules/linear/gemm.py`, `order_map`).
"""

from typing import Any

import numpy as np

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.layouts.packing import transposed
from quantdet.checkpoints.quantize import Quantized
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def encode(q: Quantized, activations: Activations) -> dict[str, Array]:
    """`qweight`, `qzeros` and `scales` of one module."""
    assert q.zero_points is not None
    return {
        "qweight": _interleaved(q.codes),
        "qzeros": _interleaved(q.zero_points),
        "scales": transposed(q.scales).astype(np.float16),
    }


def config(weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `quantization_config`."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *skipped],
    }


def _interleaved(values: Array) -> Array:
    """uint8 [N, R] -> int32 [R, N/8]."""
    rows, columns = values.shape
    if rows % 8:
        raise Unavailable(f"AWQ packs outputs by eight: need a multiple of 8, have {rows}")
    rowwise = np.ascontiguousarray(values).reshape(rows // 8, 8, columns)
    words = np.empty((rows // 8, columns, 4), np.uint8)
    for byte in range(4):
        low, high = ORDER[2 * byte : 2 * byte + 2]
        words[:, :, byte] = rowwise[:, low] | (rowwise[:, high] << np.uint8(4))
    return transposed(words.view("<i4")[:, :, 0])
