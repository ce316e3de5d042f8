"""Generated weights: the same bits on every machine, from a counter-based generator and exact integer arithmetic.

Each tensor has a Philox4x64 stream of its own, keyed with SHA-256 of `quantdet-v1/SEED/TENSOR NAME`. A weight is the sum of
the four 16-bit pieces of one raw 64-bit word (Irwin-Hall, close to normal, cut off at 3.5 standard deviations) minus its
mean: an integer that float32 holds exactly. One float32 multiplication scales it, one rounding makes it bfloat16. NumPy's
distributions are not used: their algorithms may change between versions, raw Philox words may not.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from quantdet.checkpoints.tensors import Array
from quantdet.schema import Synthetic

VERSION = 1

_CHUNK = 2**18  # words at a time: the temporaries stay inside the processor's cache
_MEAN = 2 * 65535
# Standard deviation of the sum of four uniform integers 0..65535: sqrt(4 * (65536^2 - 1) / 12).
_SIGMA = 37837.227
_LOW = np.uint64(0x0000FFFF0000FFFF)

LINEAR_STD = 0.02
EMBEDDING_STD = 1.0  # inputs that differ strongly from token to token
HEAD_STD = 0.03
NORM_STD = 0.05


def tensor(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
    """One tensor of near-normal values, bfloat16 of `shape`."""
    key = int.from_bytes(hashlib.sha256(f"quantdet-v1/{seed}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key)
    out = np.empty(math.prod(shape), ml_dtypes.bfloat16)
    step = np.float32(std / _SIGMA)
    for start in range(0, out.size, _CHUNK):
        raw = words.random_raw(min(_CHUNK, out.size - start))
        pairs = (raw & _LOW) + ((raw >> np.uint64(16)) & _LOW)
        total = ((pairs + (pairs >> np.uint64(32))) & np.uint64(0xFFFFFFFF)).astype(np.int32)
        values = (total - np.int32(_MEAN)).astype(np.float32)
        values *= step
        values += np.float32(mean)
        out[start : start + raw.size] = values.astype(ml_dtypes.bfloat16)
    return out.reshape(shape)


def config(spec: Synthetic) -> dict[str, Any]:
    """`config.json` of the model, as transformers' `Qwen3Config` reads it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def batches(spec: Synthetic) -> Iterator[dict[str, Array]]:
    """The tensors of the model, one decoder layer at a time, then embeddings, head and last norm (all bfloat16)."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {
        "self_attn.q_norm": spec.head_dim,
        "self_attn.k_norm": spec.head_dim,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    for layer in range(spec.layers):
        batch = {}
        for module, shape in linears.items():
            name = f"model.layers.{layer}.{module}.weight"
            batch[name] = tensor(spec.seed, name, shape, LINEAR_STD)
        for module, size in norms.items():
            name = f"model.layers.{layer}.{module}.weight"
            batch[name] = tensor(spec.seed, name, (size,), NORM_STD, mean=1.0)
        yield batch
    table = (spec.vocab_size, hidden)
    yield {
        "model.embed_tokens.weight": tensor(spec.seed, "model.embed_tokens.weight", table, EMBEDDING_STD),
        "lm_head.weight": tensor(spec.seed, "lm_head.weight", table, HEAD_STD),
        "model.norm.weight": tensor(spec.seed, "model.norm.weight", (hidden,), NORM_STD, mean=1.0),
    }
