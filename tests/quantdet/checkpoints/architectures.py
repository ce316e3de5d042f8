"""Architectures of synthetic models: their `config.json` and the tensors of each decoder layer, by Hugging Face name."""

from typing import Any, NamedTuple

from quantdet.matrix.shapes import Architecture, Synthetic

LINEAR_STD = 0.02
EMBEDDING_STD = 1.0  # inputs that differ strongly from token to token
HEAD_STD = 0.03
ROUTER_STD = 0.1  # tokens that prefer their experts clearly
NORM_STD = 0.05
BIAS_STD = 0.02

_NAMES: dict[Architecture, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_QK_NORM: frozenset[Architecture] = frozenset({"qwen3", "qwen3_moe", "glm4_moe"})
_QKV_BIAS: frozenset[Architecture] = frozenset({"qwen2", "glm4_moe"})
# Experts are chosen by score plus a bias that balances their load (DeepSeek-V3, https://arxiv.org/abs/2412.19437, 2.1.2).
_CORRECTED: frozenset[Architecture] = frozenset({"glm4_moe", "deepseek_v3"})


class Drawn(NamedTuple):
    """How a tensor is drawn: near-normal values of this shape."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def config(spec: Synthetic) -> dict[str, Any]:
    """`config.json` of the model, as transformers' configuration class of the architecture reads it."""
    return {
        "architectures": [_NAMES[spec.architecture]],
        "model_type": spec.architecture,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads or spec.heads,
        **({"head_dim": spec.head_dim} if spec.head_dim else {}),
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "attention_bias": spec.architecture == "glm4_moe",
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **(_latent(spec) if spec.kv_lora_rank else {}),
        **(_mixture(spec) if spec.experts else {}),
        **({"use_qk_norm": True, "partial_rotary_factor": 0.5} if spec.architecture == "glm4_moe" else {}),
    }


def _latent(spec: Synthetic) -> dict[str, Any]:
    return {
        "kv_lora_rank": spec.kv_lora_rank,
        "q_lora_rank": spec.q_lora_rank,
        "qk_nope_head_dim": spec.qk_nope_head_dim,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "v_head_dim": spec.v_head_dim,
    }


def _mixture(spec: Synthetic) -> dict[str, Any]:
    own = {"num_experts_per_tok": spec.experts_per_token, "moe_intermediate_size": spec.expert_intermediate_size}
    if spec.architecture == "qwen3_moe":
        return {
            "num_experts": spec.experts,
            **own,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,  # experts in every layer
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    corrected = spec.architecture in _CORRECTED
    return {
        "n_routed_experts": spec.experts,
        **own,
        "n_shared_experts": spec.shared_experts,
        "first_k_dense_replace": spec.dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": spec.routed_scaling,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc" if corrected else "greedy",
        "scoring_func": "sigmoid" if corrected else "softmax",
        "norm_topk_prob": corrected,
    }


def decoder_layer(spec: Synthetic, layer: int) -> dict[str, Drawn]:
    """The tensors of one decoder layer by local name: matrices [N, K], then norms and biases."""
    linears, norms = _latent_attention(spec) if spec.kv_lora_rank else _grouped_attention(spec)
    drawn = {f"self_attn.{name}.weight": Drawn(shape, LINEAR_STD) for name, shape in linears.items()}
    for name, shape in _feed_forward(spec, layer).items():
        drawn[f"mlp.{name}.weight"] = Drawn(shape, ROUTER_STD if name == "gate" else LINEAR_STD)
    for name, size in norms.items():
        drawn[f"self_attn.{name}.weight"] = Drawn((size,), NORM_STD, 1.0)
    for name in ("input_layernorm", "post_attention_layernorm"):
        drawn[f"{name}.weight"] = Drawn((spec.hidden_size,), NORM_STD, 1.0)
    if spec.architecture in _QKV_BIAS:
        for name in ("q_proj", "k_proj", "v_proj"):
            drawn[f"self_attn.{name}.bias"] = Drawn(linears[name][:1], BIAS_STD)
    if spec.mixes(layer) and spec.experts and spec.architecture in _CORRECTED:
        drawn["mlp.gate.e_score_correction_bias"] = Drawn((spec.experts,), BIAS_STD)
    return drawn


def outside(spec: Synthetic) -> dict[str, Drawn]:
    """The tensors outside of the decoder layers: embeddings and head [vocabulary, hidden], the last norm."""
    table = (spec.vocab_size, spec.hidden_size)
    return {
        "model.embed_tokens.weight": Drawn(table, EMBEDDING_STD),
        "lm_head.weight": Drawn(table, HEAD_STD),
        "model.norm.weight": Drawn((spec.hidden_size,), NORM_STD, 1.0),
    }


# Matrices [N, K] and sizes of the norms of an attention.
_Attention = tuple[dict[str, tuple[int, int]], dict[str, int]]


def _grouped_attention(spec: Synthetic) -> _Attention:
    assert spec.kv_heads is not None and spec.head_dim is not None
    hidden, queries, keys = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    norms = dict.fromkeys(("q_norm", "k_norm"), spec.head_dim) if spec.architecture in _QK_NORM else {}
    return linears, norms


def _latent_attention(spec: Synthetic) -> _Attention:
    """MLA (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.1)."""
    assert spec.kv_lora_rank and spec.qk_nope_head_dim and spec.qk_rope_head_dim and spec.v_head_dim
    hidden, queries = spec.hidden_size, spec.heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
    linears = {"q_proj": (queries, hidden)}
    norms = {"kv_a_layernorm": spec.kv_lora_rank}
    if spec.q_lora_rank:
        linears = {"q_a_proj": (spec.q_lora_rank, hidden), "q_b_proj": (queries, spec.q_lora_rank)}
        norms["q_a_layernorm"] = spec.q_lora_rank
    linears |= {
        "kv_a_proj_with_mqa": (spec.kv_lora_rank + spec.qk_rope_head_dim, hidden),
        "kv_b_proj": (spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank),
        "o_proj": (hidden, spec.heads * spec.v_head_dim),
    }
    return linears, norms


def _feed_forward(spec: Synthetic, layer: int) -> dict[str, tuple[int, int]]:
    """The matrices behind the attention [N, K]: three projections, or a router and three projections for each expert."""
    if not spec.mixes(layer):
        return _projections(spec.intermediate_size, spec.hidden_size)
    assert spec.experts and spec.expert_intermediate_size
    inner, hidden = spec.expert_intermediate_size, spec.hidden_size
    found = {"gate": (spec.experts, hidden)}
    for expert in range(spec.experts):
        found |= {f"experts.{expert}.{name}": shape for name, shape in _projections(inner, hidden).items()}
    if spec.shared_experts:
        shared = _projections(spec.shared_experts * inner, hidden)
        found |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
    return found


def _projections(inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
