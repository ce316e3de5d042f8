"""GPTQ, checkpoint format v1 (AutoGPTQ): 4 or 8 bit, symmetric, packed along the input dimension.

Per module, with W [N, K] and groups of g: `qweight` int32 [K * bits / 32, N], `qzeros` int32 [K/g, N * bits / 32],
`scales` float16 [K/g, N], `g_idx` int32 [K]. Version 1 stores z - 1: 7 for 4 bit, 127 for 8 bit
(AutoGPTQ, `auto_gptq/nn_modules/qlinear/qlinear_cuda.py`, `pack`).
"""

from typing import Any

import numpy as np

from quantdet.checkpoints.layouts.packing import pack, transposed, unsigned
from quantdet.checkpoints.quantize import Quantized
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights


def encode(q: Quantized, activations: Activations) -> dict[str, Array]:
    """`qweight`, `qzeros`, `scales` and `g_idx` of one module."""
    assert q.group is not None
    bits = _bits(q.weights)
    rows, columns = q.codes.shape
    zeros = np.full((columns // q.group, rows), 2 ** (bits - 1) - 1, np.uint8)
    return {
        "qweight": transposed(pack(unsigned(q.codes, bits), bits)),
        "qzeros": pack(zeros, bits),
        "scales": transposed(q.scales).astype(np.float16),
        "g_idx": (np.arange(columns) // q.group).astype(np.int32),
    }


def config(weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `quantization_config`; with modules skipped, those that are quantized are named, in parts of their names.

    Without these names, vLLM with `quantization = "moe_wna16"` quantizes no linear layer up to 0.26, and the router later.
    """
    named = {"modules_in_block_to_quantize": ["self_attn", "mlp.experts"]} if skipped else {}
    return {
        **named,
        "quant_method": "gptq",
        "bits": _bits(weights),
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def _bits(weights: Weights) -> int:
    return 4 if weights.startswith("int4") else 8
