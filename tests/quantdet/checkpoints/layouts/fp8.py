"""vLLM's and transformers' own FP8 (`quant_method: fp8`), dynamic activations.

Per tensor: `weight` float8_e4m3fn [N, K], `weight_scale` float32 scalar; w = q * s. Per block (DeepSeek-V3):
`weight_scale_inv` float32 [ceil(N/128), ceil(K/128)], a multiplier despite its name.
"""

from typing import Any

from quantdet.checkpoints.quantize import BLOCK, Quantized
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Weights


def encode(q: Quantized, activations: Activations) -> dict[str, Array]:
    """`weight` and its scale of one module."""
    if q.weights == "fp8-block":
        return {"weight": q.codes, "weight_scale_inv": q.scales}
    return {"weight": q.codes, "weight_scale": q.scales.reshape(())}


def config(weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `quantization_config`. Both spellings of the unquantized modules: vLLM and transformers read different ones."""
    common = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    plain = ["lm_head", *skipped]
    named = {"ignored_layers": plain, "modules_to_not_convert": plain}
    blocks = {"weight_block_size": [BLOCK, BLOCK]} if weights == "fp8-block" else {}
    return {**common, **named, **blocks}
