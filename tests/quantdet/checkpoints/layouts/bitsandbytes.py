"""bitsandbytes as transformers saves it: NF4 without double quantization, and LLM.int8().

NF4, W [N, K]: `weight` uint8 [N*K/2, 1], the first element in the high half; `weight.absmax` float32 [N*K/64];
`weight.quant_map` float32 [16]; `weight.quant_state.bitsandbytes__nf4` uint8, a JSON text
(bitsandbytes, `functional.py`, `QuantState.as_dict(packed=True)`).
LLM.int8(): `weight` int8 [N, K], `SCB` float32 [N]; w = q * SCB / 127.
"""

import json
from typing import Any

import numpy as np

from quantdet.checkpoints.layouts.packing import pack_nibbles
from quantdet.checkpoints.quantize import NF4_BLOCK, NF4_CODE, Quantized
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights


def encode(q: Quantized, activations: Activations) -> dict[str, Array]:
    """The tensors of one module."""
    if q.weights == "bnb-int8":
        return {"weight": q.codes, "SCB": q.scales.reshape(-1)}
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": list(q.codes.shape)}
    return {
        "weight": pack_nibbles(q.codes.reshape(-1, 2), even_high=True),
        "weight.absmax": q.scales,
        "weight.quant_map": NF4_CODE,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def config(weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `quantization_config`."""
    if weights == "bnb-int8":
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": ["lm_head", *skipped],
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *skipped],
    }
