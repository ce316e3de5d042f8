"""Unquantized models, bitsandbytes, gpt-oss (MXFP4 experts) and GGUF."""

import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from layouts.checkpoint import Checkpoint, Tensors, body, plain, quantized, sharded
from quantdet.checkpoints import synthetic
from quantdet.checkpoints.layouts import bitsandbytes
from quantdet.checkpoints.layouts.packing import pack_nibbles
from quantdet.checkpoints.quantize import quantize
from quantdet.checkpoints.tensors import Array

_NESTED_BLOCK = 256
_SEED = 16  # of the one model here that the suite's generator does not know: gpt-oss


def cast(word: str, dtype: Any) -> Checkpoint:
    """The unquantized model in another dtype."""
    model = plain()
    made = {name: array.astype(np.float32).astype(dtype) for name, array in model.tensors.items()}
    return Checkpoint(model.config, made).configured(torch_dtype=word)


def _tied() -> Checkpoint:
    return plain().without("lm_head.weight").configured(tie_word_embeddings=True)


def _nf4(module: str, weight: Array) -> Tensors:
    return bitsandbytes.encode(quantize("nf4", weight, group=0), "none")


def _dynamic_map() -> Array:
    """The 256 numbers of bitsandbytes' signed dynamic type, ascending (`functional.py`, `create_dynamic_map`)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        edges = [0.1 + 0.9 * place / parts for place in range(parts + 1)]
        means = [10.0 ** (exponent - 6) * (low + high) / 2 for low, high in pairwise(edges)]
        found += means + [-one for one in means]
    return np.array(sorted(found), np.float32)


def _nested(module: str, weight: Array) -> Tensors:
    """NF4 whose scales are quantized too: less their mean, by blocks of 256, to the nearest of the dynamic type."""
    made = _nf4(module, weight)
    absmax, numbers = made["weight.absmax"], _dynamic_map()
    offset = math.fsum(absmax.tolist()) / absmax.size
    blocks = (absmax - np.float32(offset)).reshape(-1, min(_NESTED_BLOCK, absmax.size))
    largest = np.abs(blocks).max(axis=1)
    middles = (numbers[1:] + numbers[:-1]) / np.float32(2)
    codes = np.searchsorted(middles, blocks / largest[:, None]).astype(np.uint8)
    state = json.loads(made["weight.quant_state.bitsandbytes__nf4"].tobytes())
    state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return {
        **made,
        "weight.absmax": codes.reshape(-1),
        "weight.nested_absmax": largest,
        "weight.nested_quant_map": numbers,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def _bnb(encode: Callable[[str, Array], Tensors], **more: Any) -> Checkpoint:
    return quantized({**bitsandbytes.config("nf4", "none", 0), **more}, body(encode))


def _bnb_int8() -> Checkpoint:
    def encode(module: str, weight: Array) -> Tensors:
        return bitsandbytes.encode(quantize("bnb-int8", weight, group=0), "none")

    return quantized(bitsandbytes.config("bnb-int8", "none", 0), body(encode))


_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 1024, "hidden_size": 256,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2, "hidden_act": "silu", "swiglu_limit": 7.0,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128, "attention_bias": True,
    "max_position_embeddings": 4096, "initial_context_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    },
}  # fmt: skip


def _oss() -> Checkpoint:
    """gpt-oss: all experts of a layer in one tensor, four bits in blocks of 32; the rest is bfloat16."""
    hidden, queries, keys, experts = 256, 256, 128, 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1024, hidden), "lm_head.weight": (1024, hidden)}
    norms, packed = ["model.norm.weight"], {}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        norms += [f"{prefix}{name}_layernorm.weight" for name in ("input", "post_attention")]
        for name, size, inputs in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, inputs)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{prefix}self_attn.sinks"] = (4,)
        shapes |= {f"{prefix}mlp.router.weight": (experts, hidden), f"{prefix}mlp.router.bias": (experts,)}
        for name, size in (("gate_up", 2 * hidden), ("down", hidden)):
            shapes[f"{prefix}mlp.experts.{name}_proj_bias"] = (experts, size)
            packed[f"{prefix}mlp.experts.{name}_proj"] = (experts * size, hidden)
    made = {name: synthetic.tensor(_SEED, name, shape, 1.0 if "embed" in name else 0.03) for name, shape in shapes.items()}
    made |= {name: synthetic.tensor(_SEED, name, (hidden,), 0.05, 1.0) for name in norms}
    for name, shape in packed.items():
        four = quantize("mxfp4", synthetic.tensor(_SEED, name, shape, 0.02), group=32)
        blocks = (experts, shape[0] // experts, shape[1] // 32)
        made[f"{name}_blocks"] = pack_nibbles(four.codes).reshape(*blocks, 16)
        made[f"{name}_scales"] = four.scales.reshape(blocks)
    return Checkpoint(_OSS, made)


_LLAMA_CPP = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def _gguf(kind: gguf.GGMLQuantizationType) -> Checkpoint:
    """One file that holds all, llama.cpp's names and keys; no config.json beside it."""
    model = plain()
    settings = model.config
    assert settings is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        writer = gguf.GGUFWriter(path, "qwen3")
        writer.add_block_count(settings["num_hidden_layers"])
        writer.add_context_length(settings["max_position_embeddings"])
        writer.add_embedding_length(settings["hidden_size"])
        writer.add_feed_forward_length(settings["intermediate_size"])
        writer.add_head_count(settings["num_attention_heads"])
        writer.add_head_count_kv(settings["num_key_value_heads"])
        writer.add_key_length(settings["head_dim"])
        writer.add_value_length(settings["head_dim"])
        writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
        writer.add_rope_freq_base(settings["rope_theta"])
        writer.add_vocab_size(settings["vocab_size"])
        for name, array in model.tensors.items():
            module, values = name.removesuffix(".weight"), array.astype(np.float32)
            parts = module.split(".", 3)
            there = f"blk.{parts[2]}.{_LLAMA_CPP[parts[3]]}" if len(parts) == 4 else _OUTSIDE[module]
            if array.ndim == 2:
                writer.add_tensor(f"{there}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"{there}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Checkpoint(None, {}, files={"model.gguf": path.read_bytes()})


MADE: dict[str, Callable[[], Checkpoint]] = {
    "plain-bf16": plain,
    "plain-fp16": partial(cast, "float16", np.float16),
    "plain-fp32": partial(cast, "float32", np.float32),
    "plain-tied": _tied,
    "plain-sharded": lambda: sharded(plain()),
    "plain-experts": partial(plain, True),
    "bnb-nf4": partial(_bnb, _nf4),
    "bnb-nf4-nested": partial(_bnb, _nested, bnb_4bit_use_double_quant=True),
    "bnb-int8": _bnb_int8,
    "gpt-oss-mxfp4": _oss,
    "gguf-q8_0": partial(_gguf, gguf.GGMLQuantizationType.Q8_0),
    "gguf-q4_0": partial(_gguf, gguf.GGMLQuantizationType.Q4_0),
}
