"""Checkpoints of a mixture of experts: every expert is quantized, the router is not, and each layout says so."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.checkpoints import resolve, tensors
from quantdet.checkpoints.quantize import quantize
from selftest.test_checkpoints import BF16, make_format, make_model

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
