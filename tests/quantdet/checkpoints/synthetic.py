"""Generated weights: the same bits on every machine, from a counter-based generator and exact integer arithmetic.

Each tensor has a Philox4x64 stream of its own, keyed with SHA-256 of `quantdet-v1/SEED/TENSOR NAME`. A weight is the sum of
the four 16-bit pieces of one raw 64-bit word (Irwin-Hall, close to normal, cut off at 3.5 standard deviations) minus its
mean: an integer that float32 holds exactly. One float32 multiplication scales it, one rounding makes it bfloat16. NumPy's
distributions are not used: their algorithms may change between versions, raw Philox words may not.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from quantdet.checkpoints.tensors import Array, Load
from quantdet.schema import Synthetic

VERSION = 1

_CHUNK = 2**16  # words at a time: the temporaries stay inside the processor's cache
_MEAN = 2 * 65535
# Standard deviation of the sum of four uniform integers 0..65535: sqrt(4 * (65536^2 - 1) / 12).
_SIGMA = 37837.227
_LOW = np.uint64(0x0000FFFF0000FFFF)

LINEAR_STD = 0.02
EMBEDDING_STD = 1.0  # inputs that differ strongly from token to token
HEAD_STD = 0.03
ROUTER_STD = 0.1  # tokens that prefer their experts clearly
NORM_STD = 0.05


def tensor(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
    """One tensor of near-normal values, bfloat16 of `shape`."""
    key = int.from_bytes(hashlib.sha256(f"quantdet-v1/{seed}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key)
    table = _weights(std, mean)
    out = np.empty(math.prod(shape), np.uint16)
    upper = np.empty(min(_CHUNK, out.size), np.uint64)
    for start in range(0, out.size, _CHUNK):
        raw = words.random_raw(min(_CHUNK, out.size - start))
        other = upper[: raw.size]
        np.right_shift(raw, np.uint64(16), out=other)
        other &= _LOW
        raw &= _LOW
        raw += other  # two sums of two pieces
        raw *= np.uint64(2**32 + 1)  # their sum in the upper half
        raw >>= np.uint64(32)
        table.take(raw.view(np.int64), mode="clip", out=out[start : start + raw.size])
    return np.asarray(out.view(ml_dtypes.bfloat16).reshape(shape))


@lru_cache(maxsize=8)
def _weights(std: float, mean: float) -> Array:
    """The bits of the weight for every sum of four pieces: looking one up is faster than making it from the sum."""
    values = (np.arange(2**18, dtype=np.int32) - np.int32(_MEAN)).astype(np.float32)
    values *= np.float32(std / _SIGMA)
    values += np.float32(mean)
    return np.asarray(values.astype(ml_dtypes.bfloat16).view(np.uint16))


def config(spec: Synthetic) -> dict[str, Any]:
    """`config.json` of the model, as transformers' `Qwen3Config` or `Qwen3MoeConfig` reads it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM" if spec.experts else "Qwen3ForCausalLM"],
        "model_type": spec.architecture,
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
        **(_mixture(spec) if spec.experts else {}),
    }


def _mixture(spec: Synthetic) -> dict[str, Any]:
    return {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
        "moe_intermediate_size": spec.expert_intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,  # experts in every layer
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def batches(spec: Synthetic, plain: Mapping[str, Array] | None = None) -> Iterator[dict[str, Load]]:
    """The tensors of the model, one decoder layer at a time, then embeddings, head and last norm (all bfloat16).

    With `plain`, the tensors of this model's plain checkpoint, they are taken from there.
    """

    def load(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Load:
        return partial(tensor, spec.seed, name, shape, std, mean) if plain is None else partial(plain.__getitem__, name)

    hidden = spec.hidden_size
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        **_feed_forward(spec),
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
            batch[name] = load(name, shape, ROUTER_STD if module == "mlp.gate" else LINEAR_STD)
        for module, size in norms.items():
            name = f"model.layers.{layer}.{module}.weight"
            batch[name] = load(name, (size,), NORM_STD, 1.0)
        yield batch
    table = (spec.vocab_size, hidden)
    yield {
        "model.embed_tokens.weight": load("model.embed_tokens.weight", table, EMBEDDING_STD),
        "lm_head.weight": load("lm_head.weight", table, HEAD_STD),
        "model.norm.weight": load("model.norm.weight", (hidden,), NORM_STD, 1.0),
    }


def _feed_forward(spec: Synthetic) -> dict[str, tuple[int, int]]:
    """The matrices behind the attention [N, K]: three projections, or a router and three projections for each expert."""
    hidden = spec.hidden_size
    inner = spec.expert_intermediate_size or spec.intermediate_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if not spec.experts:
        return {f"mlp.{name}": shape for name, shape in shapes.items()}
    router = {"mlp.gate": (spec.experts, hidden)}
    experts = range(spec.experts)
    return router | {f"mlp.experts.{expert}.{name}": shape for expert in experts for name, shape in shapes.items()}
