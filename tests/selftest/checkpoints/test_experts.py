"""Checkpoints of a mixture of experts: every expert is quantized, the router is not, and each layout says so."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.checkpoints import Unavailable, resolve, tensors
from quantdet.checkpoints.quantize import quantize
from selftest.fakes.checkpoints import BF16, make_format, make_model

SPEC = {
    "architecture": "qwen3_moe", "seed": 0, "vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "layers": 2,
    "heads": 2, "kv_heads": 1, "head_dim": 64, "experts": 3, "experts_per_token": 2, "expert_intermediate_size": 256,
}  # fmt: skip
MODEL = make_model(synthetic=SPEC)
ROUTERS = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
PROJECTIONS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.experts.{expert}.{name}_proj" for expert in range(3) for name in ("gate", "up", "down")),
}

# SHA-256 over the tensors of SPEC, as in test_checkpoints.
GOLDEN = {
    ("plain", "bf16", "none"): "6280b0e5f3db836973874a72f69297fbebee21e743352cddb501bf6852328e0e",
    ("gptq", "int4-sym", "none"): "153c4b70dc992b010119d39adb690e9d515669691eb024a8badc731a5f9c3a0d",
}
LAYOUTS = [
    ("gptq", "int4-sym", "none"), ("awq", "int4-asym", "none"), ("ct", "int4-sym", "none"), ("fp8", "fp8-block", "fp8"),
    ("bnb", "nf4", "none"),
]  # fmt: skip


def config_of(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("words", GOLDEN, ids="-".join)
def test_bits_of_a_synthetic_mixture(words: tuple[str, str, str], tmp_path: Path) -> None:
    assert GOLDEN[words] == resolve("m", MODEL, make_format(*words), cache=tmp_path).sha256


def test_plain_weights_and_configuration(tmp_path: Path) -> None:
    """Names and shapes as Hugging Face has them, in every layer."""
    made = resolve("m", MODEL, BF16, cache=tmp_path)
    shapes = {name: array.shape for name, array in tensors.load_folder(made.path).items()}
    config = config_of(made.path)

    assert "synthetic qwen3_moe, seed 0" == made.source
    assert ("qwen3_moe", ["Qwen3MoeForCausalLM"]) == (config["model_type"], config["architectures"])
    assert (3, 2, 256) == tuple(config[name] for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        assert (3, 128) == shapes[f"{prefix}gate.weight"]
        for expert in range(3):
            assert [(256, 128), (256, 128), (128, 256)] == [
                shapes[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            ]
    assert not [name for name in shapes if ".mlp.gate_proj" in name]


def test_the_router_prefers_experts_clearly(tmp_path: Path) -> None:
    """Its weights are wider than the others, and no two experts have the same."""
    plain = tensors.load_folder(resolve("m", MODEL, BF16, cache=tmp_path).path)
    router = plain["model.layers.0.mlp.gate.weight"].astype(np.float64)
    experts = [plain[f"model.layers.0.mlp.experts.{number}.up_proj.weight"].tobytes() for number in range(3)]

    assert 0.08 < router.std() < 0.12
    assert 3 == len(set(experts))


@pytest.mark.parametrize("words", LAYOUTS, ids="-".join)
def test_every_expert_is_quantized_and_no_router(words: tuple[str, str, str], tmp_path: Path) -> None:
    """The router keeps its bits; no expert keeps an unquantized weight."""
    plain = tensors.load_folder(resolve("m", MODEL, BF16, cache=tmp_path).path)
    path = resolve("m", MODEL, make_format(*words), cache=tmp_path).path
    found = tensors.load_folder(path)

    for router in ROUTERS:
        assert plain[f"{router}.weight"].tobytes() == found[f"{router}.weight"].tobytes()
    for layer in range(2):
        for module in PROJECTIONS:
            mine = {name: a for name, a in found.items() if name.startswith(f"model.layers.{layer}.{module}.")}
            assert len(mine) > 1
            weight = mine.get(f"model.layers.{layer}.{module}.weight")
            assert weight is None or weight.dtype != ml_dtypes.bfloat16
    row = config_of(path)["quantization_config"]
    skipped = [value for value in row.values() if isinstance(value, list) and "lm_head" in value]
    if words[0] == "gptq":
        assert ["self_attn", "mlp.experts"] == row["modules_in_block_to_quantize"]
        assert not any(part in router for part in row["modules_in_block_to_quantize"] for router in ROUTERS)
    else:
        assert skipped and all(["lm_head", *ROUTERS] == value for value in skipped)


def test_an_expert_is_quantized_as_a_dense_projection_is(tmp_path: Path) -> None:
    """The numbers are those of the quantizer, in the layout's packing."""
    name = "model.layers.1.mlp.experts.2.down_proj"
    plain = tensors.load_folder(resolve("m", MODEL, BF16, cache=tmp_path).path)
    found = tensors.load_folder(resolve("m", MODEL, make_format("gptq", "int4-sym"), cache=tmp_path).path)
    wanted = quantize("int4-sym", plain[f"{name}.weight"], group=128)

    words = found[f"{name}.qweight"].view(np.uint32)  # [K/8, N]
    codes = np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], axis=1).reshape(256, 128)
    np.testing.assert_array_equal(wanted.codes, codes.T.astype(np.int8) - 8)
    np.testing.assert_array_equal(wanted.scales.T.astype(np.float16), found[f"{name}.scales"])


def test_gate_and_up_of_one_expert_share_a_scale(tmp_path: Path) -> None:
    """Fused projections have one scale for the tensor, but each expert its own."""
    found = tensors.load_folder(resolve("m", MODEL, make_format("fp8", "fp8-tensor", "fp8"), cache=tmp_path).path)
    scales = {
        name.split("experts.")[1]: float(array)
        for name, array in found.items()
        if name.startswith("model.layers.0.mlp.experts.") and name.endswith("weight_scale")
    }

    for expert in range(3):
        assert scales[f"{expert}.gate_proj.weight_scale"] == scales[f"{expert}.up_proj.weight_scale"]
    assert len({scales[f"{expert}.gate_proj.weight_scale"] for expert in range(3)}) > 1


def test_a_dense_configuration_has_no_word_of_routers(tmp_path: Path) -> None:
    """Checkpoints without experts are what they were."""
    path = resolve("m", make_model(), make_format("gptq", "int4-sym"), cache=tmp_path).path

    assert "modules_in_block_to_quantize" not in config_of(path)["quantization_config"]
    assert not {"num_experts", "moe_intermediate_size"} & config_of(path).keys()


# ---------------------------------------------------------------------------------------------------- other architectures

SHARED = {
    "seed": 0, "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 2, "experts": 3,
    "experts_per_token": 2, "expert_intermediate_size": 128, "dense_layers": 1, "shared_experts": 2, "routed_scaling": 1.5,
}  # fmt: skip
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**SHARED, **LATENT},
    "deepseek_v3": {**SHARED, **LATENT, "q_lora_rank": 96},
    "glm4_moe": {**SHARED, "kv_heads": 1, "head_dim": 64},
}


def made_of(architecture: str, words: tuple[str, str, str], cache: Path, **more: str) -> Path:
    model = make_model(synthetic={"architecture": architecture, **OTHERS[architecture]})
    return resolve("m", model, make_format(*words).model_copy(update=more), cache=cache).path


@pytest.mark.parametrize("architecture", OTHERS)
def test_names_and_shapes_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    """As Hugging Face has them: a dense layer first, shared experts, latent attention, biases."""
    path = made_of(architecture, ("plain", "bf16", "none"), tmp_path)
    shapes = {name: array.shape for name, array in tensors.load_folder(path).items()}
    config = config_of(path)

    assert architecture == config["model_type"]
    assert (1, 3, 2, 1.5) == tuple(
        config[name] for name in ("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "routed_scaling_factor")
    )
    assert (256, 128) == shapes["model.layers.0.mlp.gate_proj.weight"]  # a dense layer first
    assert "model.layers.1.mlp.gate_proj.weight" not in shapes
    assert (2 * 128, 128) == shapes["model.layers.1.mlp.shared_experts.gate_proj.weight"]
    assert (128, 128) == shapes["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert (architecture != "deepseek_v2") == ("model.layers.1.mlp.gate.e_score_correction_bias" in shapes)
    assert (architecture == "glm4_moe") == ("model.layers.0.self_attn.q_proj.bias" in shapes)
    if architecture == "deepseek_v3":
        assert (96, 128) == shapes["model.layers.0.self_attn.q_a_proj.weight"]
        assert (2 * 64, 96) == shapes["model.layers.0.self_attn.q_b_proj.weight"]
    if architecture != "glm4_moe":
        assert (64 + 32, 128) == shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
        assert (2 * 64, 64) == shapes["model.layers.0.self_attn.kv_b_proj.weight"]
        assert (128, 2 * 32) == shapes["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize("architecture", OTHERS)
def test_every_projection_of_other_architectures_is_quantized(architecture: str, tmp_path: Path) -> None:
    """Latent attention and shared experts too; routers, norms, biases and the head keep their bits."""
    plain = tensors.load_folder(made_of(architecture, ("plain", "bf16", "none"), tmp_path))
    found = tensors.load_folder(made_of(architecture, ("ct", "fp8-channel", "fp8"), tmp_path))

    for name, weight in plain.items():
        kept = weight.ndim == 1 or ".mlp.gate." in name or not name.startswith("model.layers.")
        assert kept == (found[name].dtype == weight.dtype), name
        assert not kept or weight.tobytes() == found[name].tobytes()


def test_the_routed_experts_alone(tmp_path: Path) -> None:
    """As Kimi-K2: every other projection keeps its bits, and the configuration names it."""
    plain = tensors.load_folder(made_of("deepseek_v3", ("plain", "bf16", "none"), tmp_path))
    path = made_of("deepseek_v3", ("ct", "int4-sym", "none"), tmp_path, quantizes="experts")
    found = tensors.load_folder(path)
    ignored = config_of(path)["quantization_config"]["ignore"]

    for name, weight in plain.items():
        if ".experts." in name:
            assert name not in found and f"{name}_packed" in found
        else:
            assert weight.tobytes() == found[name].tobytes()
            linear = weight.ndim == 2 and name != "model.embed_tokens.weight"
            assert linear == (name.removesuffix(".weight") in ignored), name


def test_gptq_names_no_shared_expert(tmp_path: Path) -> None:
    """Its configuration has words for attention and experts only: another mixture would be misread."""
    with pytest.raises(Unavailable, match="need experts in every layer and none that are shared"):
        made_of("glm4_moe", ("gptq", "int4-sym", "none"), tmp_path)


def test_experts_alone_of_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="need a decoder with routed experts"):
        resolve("m", make_model(), make_format("ct", "int4-sym").model_copy(update={"quantizes": "experts"}), cache=tmp_path)


def test_compressed_queries_and_keys_share_a_scale(tmp_path: Path) -> None:
    """An engine fuses them into one matrix, which has one scale for the tensor."""
    found = tensors.load_folder(made_of("deepseek_v3", ("fp8", "fp8-tensor", "fp8"), tmp_path))
    scales = [float(found[f"model.layers.0.self_attn.{name}.weight_scale"]) for name in ("q_a_proj", "kv_a_proj_with_mqa")]

    assert scales[0] == scales[1]
    assert scales[0] != float(found["model.layers.0.self_attn.q_b_proj.weight_scale"])
