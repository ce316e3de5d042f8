"""Why a checkpoint cannot be what it says: no reason of a whole one, one reason of each seeded defect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.checkpoints.flaws import flaws
from quantdet.checkpoints.layouts.packing import pack
from quantdet.checkpoints.tensors import save, tensors_sha256
from selftest.fakes.edited import LAYOUTS, Q1, Q, edited, made, sharded, write_index


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("layout", "weights", "activations"), LAYOUTS)
def test_a_whole_checkpoint_has_none(cache: Path, layout: str, weights: str, activations: str) -> None:
    assert () == flaws(made(cache, layout, weights, activations).path)


def test_a_mixture_has_none(cache: Path) -> None:
    """Routers stay as they are, and are named."""
    spec: dict[str, Any] = {
        "architecture": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate_size": 128,
    }  # fmt: skip
    for words in (("gptq", "int4-sym"), ("ct", "int4-sym"), ("awq", "int4-asym"), ("fp8", "fp8-block", "fp8")):
        assert () == flaws(made(cache, *words, **spec).path), words


# ---------------------------------------------------------------------------------------------- whole, in makers' other ways


def channel_gptq(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["group_size"] = -1
    for name in list(tensors):
        if name.endswith((".scales", ".qzeros")):
            tensors[name] = tensors[name][:1]
        if name.endswith(".g_idx"):
            tensors[name] = np.zeros_like(tensors[name])


def act_order(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["desc_act"] = True
    for name in list(tensors):
        if name.endswith(".g_idx"):
            tensors[name] = np.random.default_rng(0).permutation(tensors[name]).astype(np.int32)


def version_2(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["checkpoint_format"] = "gptq_v2"
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name] = np.full_like(tensors[name], np.int32(-2004318072))  # 0x88888888


def mixed_gptq(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    """One module in 8 bit, one left as it is, both by rules."""
    settings["dynamic"] = {r"+:.*\.1\.self_attn\.q_proj": {"bits": 8}, r"-:.*\.1\.self_attn\.k_proj": {}}
    groups, outputs = tensors[f"{Q1}.scales"].shape
    tensors[f"{Q1}.qweight"] = np.concatenate([tensors[f"{Q1}.qweight"]] * 2)
    tensors[f"{Q1}.qzeros"] = pack(np.full((groups, outputs), 127, np.uint8), 8)
    plain_module(tensors, Q1.replace("q_proj", "k_proj"))


def three_bit(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["bits"] = 3
    for name in list(tensors):
        if name.endswith(".qweight"):
            tensors[name] = tensors[name][: tensors[name].shape[0] * 3 // 4]
        if name.endswith(".qzeros"):
            tensors[name] = three_bit_middles(tensors[name].shape[0], tensors[name].shape[1] * 8)


def three_bit_middles(groups: int, outputs: int) -> Any:
    """Zero points of 3, which version 1 means 4 by, in 3 bits each."""
    single = np.tile(np.array([1, 1, 0], np.uint8), (groups, outputs))
    return np.packbits(single, axis=1, bitorder="little").view(np.int32)


def plain_module(tensors: dict[str, Any], module: str) -> None:
    shape = tensors[f"{module}.scales"].shape[-1], tensors[f"{module}.qweight"].shape[0] * 8
    for local in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{module}.{local}", None)
    tensors[f"{module}.weight"] = np.ones(shape, ml_dtypes.bfloat16)


def awq_left_out(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    module = Q1.replace("q_proj", "k_proj")
    settings["modules_to_not_convert"] = [*settings["modules_to_not_convert"], "layers.1.self_attn.k_proj"]
    shape = tensors[f"{module}.scales"].shape[-1], tensors[f"{module}.qweight"].shape[0]
    for local in ("qweight", "qzeros", "scales"):
        del tensors[f"{module}.{local}"]
    tensors[f"{module}.weight"] = np.ones(shape, ml_dtypes.bfloat16)


def quantized_head(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["lm_head"] = True
    for local in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"lm_head.{local}"] = tensors[f"{Q}.{local}"]
    del tensors["lm_head.weight"]


def ct_order(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    for name in list(tensors):
        if name.endswith(".weight_packed"):
            inputs = tensors[name].shape[1] * 8
            tensors[name.replace("weight_packed", "weight_g_idx")] = (np.arange(inputs)[::-1] // 64).astype(np.int32)


def ct_channel(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    weights = settings["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "channel", "group_size": None}
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name] = tensors[name][:, :1]


def ct_left_out(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["ignore"] = ["lm_head", r"re:.*\.1\.self_attn\.q_proj"]
    rows, columns = tensors[f"{Q1}.weight_packed"].shape
    for local in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{Q1}.{local}"]
    tensors[f"{Q1}.weight"] = np.ones((rows, columns * 8), ml_dtypes.bfloat16)


def kv_scales(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    for layer in (0, 1):
        for local in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{local}"] = np.array([0.02], np.float32)


def dead_row(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """bitsandbytes' scale of a row that was all zeros is zero."""
    tensors[f"{Q}.weight"][0], tensors[f"{Q}.SCB"][0] = 0, 0


def dead_block(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    tensors[f"{Q}.weight"].reshape(-1)[:32], tensors[f"{Q}.weight.absmax"][0] = 0x77, 0


def small_group(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """A narrow scale below a global one underflows where weights are small."""
    tensors[f"{Q}.weight_scale"][0, 0] = 0


@pytest.mark.parametrize(
    ("words", "edit"),
    [
        (("gptq", "int4-sym"), channel_gptq), (("gptq", "int4-sym"), act_order), (("gptq", "int4-sym"), version_2),
        (("gptq", "int4-sym"), mixed_gptq), (("gptq", "int4-sym"), three_bit), (("gptq", "int4-sym"), quantized_head),
        (("awq", "int4-asym"), awq_left_out), (("ct", "int4-sym"), ct_order), (("ct", "int4-sym"), ct_channel),
        (("ct", "int4-sym"), ct_left_out), (("ct", "int8-channel", "int8"), kv_scales),
        (("bnb", "bnb-int8", "int8"), dead_row), (("bnb", "nf4"), dead_block), (("ct", "nvfp4"), small_group),
    ],
)  # fmt: skip
def test_what_makers_do_is_no_flaw(cache: Path, tmp_path: Path, words: tuple[str, ...], edit: Callable[..., None]) -> None:
    assert () == flaws(edited(made(cache, *words).path, tmp_path / "copy", edit))


# ---------------------------------------------------------------------------------------------------- seeded, in one tensor


def put(name: str, value: Any, at: Any = (0, 0)) -> Callable[..., None]:
    """One value of one tensor is another."""

    def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[name][at] = value

    return edit


def bits(name: str, value: int) -> Callable[..., None]:
    """One element has these bits."""

    def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        array = tensors[name]
        array.reshape(-1).view(f"<u{array.dtype.itemsize}")[5] = value

    return edit


def settings_of(**changes: Any) -> Callable[..., None]:
    def edit(_: dict[str, Any], settings: dict[str, Any]) -> None:
        settings |= changes

    return edit


def weights_of(**changes: Any) -> Callable[..., None]:
    def edit(_: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["config_groups"]["group_0"]["weights"] |= changes

    return edit


def format_of(form: str) -> Callable[..., None]:
    def edit(_: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["format"] = settings["config_groups"]["group_0"]["format"] = form

    return edit


def without(*names: str) -> Callable[..., None]:
    def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return edit


def all_without(local: str) -> Callable[..., None]:
    def edit(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["desc_act"] = True
        for name in [name for name in tensors if name.endswith(f".{local}")]:
            del tensors[name]

    return edit


def to_awq(_: dict[str, Any], settings: dict[str, Any]) -> None:
    settings.clear()
    settings |= {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def to_gptq(_: dict[str, Any], settings: dict[str, Any]) -> None:
    settings.clear()
    settings |= {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}


def stored_plain(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    tensors[f"{Q1}.weight"] = np.ones((128, 128), ml_dtypes.bfloat16)
    del tensors[f"{Q1}.weight_scale"]


def nothing_quantized(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings |= {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


def static_cache(_: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def off_middle(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    tensors[f"{Q}.qzeros"][0, 0] ^= 1


def ct_off_middle(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["config_groups"]["group_0"]["weights"]["symmetric"] = True


def awq_method_gone(_: dict[str, Any], settings: dict[str, Any]) -> None:
    del settings["quant_method"]


def static_inputs(_: dict[str, Any], settings: dict[str, Any]) -> None:
    inputs = settings["config_groups"]["group_0"]["input_activations"]
    inputs |= {"strategy": "tensor", "dynamic": False}


def as_dtype(name: str, dtype: Any) -> Callable[..., None]:
    """A tensor's numbers in another dtype."""

    def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[name] = tensors[name].astype(np.float32).astype(dtype)

    return edit


def other_order(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """Inputs of two groups exchanged, where the configuration does not say so."""
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"][::-1].copy()


def int8_of_four_bits(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["config_groups"]["group_0"]["weights"]["num_bits"] = 4


NAN = "NaN or infinity in 1 of"
GPTQ, AWQ, CT, CT_ASYM = ("gptq", "int4-sym"), ("awq", "int4-asym"), ("ct", "int4-sym"), ("ct", "int4-asym")
FP8, BLOCK, INT8 = ("fp8", "fp8-tensor", "fp8"), ("fp8", "fp8-block", "fp8"), ("ct", "int8-channel", "int8")
SEEDED = [
    ("nan-norm", GPTQ, bits("model.norm.weight", 0x7FC0), f"model.norm.weight: {NAN} 128 values, first at 5"),
    ("infinity", GPTQ, bits("model.norm.weight", 0xFF80), f"model.norm.weight: {NAN}"),
    ("nan-scale", GPTQ, bits(f"{Q}.scales", 0x7E01), f"{Q}.scales: {NAN}"),
    ("nan-fp8", ("ct", "fp8-channel", "fp8"), bits(f"{Q}.weight", 0xFF), f"{Q}.weight: {NAN}"),
    ("nan-f32", INT8, bits(f"{Q}.weight_scale", 0x7F800001), f"{Q}.weight_scale: {NAN}"),
    ("nan-e8m0", ("ct", "mxfp4"), put(f"{Q}.weight_scale", 255), f"{Q}.weight_scale: NaN (E8M0 255) in 1 of"),
    ("zero-gptq", GPTQ, put(f"{Q}.scales", 0), f"{Q}.scales: 1 of 256 scales are zero"),
    ("zero-minus", GPTQ, put(f"{Q}.scales", -0.0), f"{Q}.scales: 1 of 256 scales are zero"),
    ("zero-ct", CT, put(f"{Q}.weight_scale", 0), f"{Q}.weight_scale: 1 of 256 scales are zero"),
    ("zero-block", BLOCK, put(f"{Q}.weight_scale_inv", 0), f"{Q}.weight_scale_inv: 1 of 1 scales are zero"),
    ("zero-global", ("ct", "nvfp4"), put(f"{Q}.weight_global_scale", 0, 0), "weight_global_scale: 1 of 1 scales are zero"),
    ("zero-all-local", ("ct", "nvfp4"), put(f"{Q}.weight_scale", 0, ...), f"{Q}.weight_scale: 1024 of 1024 scales are zero"),
    ("zero-scb", ("bnb", "bnb-int8", "int8"), put(f"{Q}.SCB", 0, 3), f"{Q}.SCB: 1 of 128 scales are zero"),
    ("zero-absmax", ("bnb", "nf4"), put(f"{Q}.weight.absmax", 0, 0), f"{Q}.weight.absmax: 1 of 256 scales are zero"),
    ("group", GPTQ, settings_of(group_size=32), "scales is [4, 128], and group_size 32 of 256 inputs at 4 bit asks"),
    ("group-awq", AWQ, settings_of(group_size=128), "scales is [4, 128], and group_size 128 of 256 inputs asks for [2, 128]"),
    ("group-ct", CT, weights_of(group_size=32), "weight_scale is [128, 4], and strategy group 32 of [128, 256] asks"),
    ("bits", GPTQ, settings_of(bits=8), "qweight holds 4 bit for each of 256 inputs, and the configuration says 8"),
    ("bits-ct", CT, weights_of(num_bits=8), "weight_packed is [128, 32], and weight_shape [128, 256] at 8 bit"),
    ("bits-awq", AWQ, settings_of(bits=8), "qweight holds 4 bit for each output, and the configuration says 8"),
    ("order", GPTQ, all_without("g_idx"), "lacks g_idx, and desc_act asks for it"),
    ("order-ct", CT, weights_of(actorder="group"), "lacks weight_g_idx, and actorder asks for it"),
    ("order-range", GPTQ, put(f"{Q}.g_idx", 2, 0), f"{Q}: g_idx names group 2, and there are 2"),
    ("sym", GPTQ, off_middle, "1 of 256 zero points are not in the middle, and the configuration says symmetric"),
    ("sym-ct", CT_ASYM, ct_off_middle, "zero points are not in the middle, and the configuration says symmetric"),
    ("asym-ct", CT, weights_of(symmetric=False), "lacks weight_zero_point"),
    ("half", GPTQ, without(f"{Q}.qweight"), f"{Q}: lacks qweight"),
    ("half-ct", CT, without(f"{Q}.weight_scale"), f"{Q}: lacks weight_scale"),
    ("half-fp8", FP8, without(f"{Q}.weight_scale"), f"{Q}: is stored as F8_E4M3 without scales"),
    ("awq-as-gptq", AWQ, to_gptq, "is stored as AWQ (packed along the outputs), and the configuration says gptq"),
    ("gptq-as-awq", GPTQ, to_awq, "is stored as GPTQ (packed along the inputs), and the configuration says awq"),
    ("int8-as-pack", INT8, format_of("pack-quantized"), "weight is I8, and format pack-quantized asks for packed integers"),
    ("int8-as-float", INT8, weights_of(type="float"), "weight is I8, and int-quantized of 8-bit float asks for F8_E4M3"),
    ("pack-as-int8", CT, format_of("int-quantized"), "weight_packed is I32, and format int-quantized asks for a plain weight"),
    ("blocks", BLOCK, settings_of(weight_block_size=[64, 64]), "weight_block_size [64, 64] of [128, 256] asks for [2, 4]"),
    ("one-scale", BLOCK, settings_of(weight_block_size=None), "lacks weight_scale"),
    ("static", FP8, settings_of(activation_scheme="static"), "lacks input_scale"),
    ("static-ct", INT8, static_inputs, "lacks input_scale"),
    ("left-out-gptq", GPTQ, settings_of(dynamic={r"-:.*\.1\..*": {}}), "1.mlp.up_proj and 4 more"),
    ("left-out-awq", AWQ, settings_of(modules_to_not_convert=["self_attn.q_proj"]), f"{Q}, {Q1}: is stored quantized, and"),
    ("left-out-ct", CT, settings_of(ignore=[Q]), f"{Q}: is stored quantized, and the configuration leaves it out"),
    ("left-out-pattern", CT, settings_of(ignore=["re:.*q_proj"]), f"{Q}, {Q1}: is stored quantized, and"),
    ("left-out-fp8", FP8, settings_of(ignored_layers=[Q1]), f"{Q1}: is stored quantized, and"),
    ("plain-ct", INT8, stored_plain, f"{Q1}: is stored unquantized, and the configuration quantizes it"),
    ("nothing", ("plain", "bf16"), nothing_quantized, "the configuration says gptq, and no tensor is stored quantized"),
    ("cache", INT8, static_cache, "kv_cache_scheme is static, and there is no k_scale or v_scale"),
    ("e5m2", ("ct", "fp8-channel", "fp8"), as_dtype(f"{Q}.weight", ml_dtypes.float8_e5m2), f"{Q}: weight is F8_E5M2, and"),
    ("packed-floats", CT, as_dtype(f"{Q}.weight_packed", np.float32), f"{Q}: weight_packed is F32, and pack-quantized asks"),
    ("integer-scales", CT, as_dtype(f"{Q}.weight_scale", np.int32), f"{Q}: weight_scale is I32, which is no dtype of scales"),
    ("awq-sym", AWQ, settings_of(zero_point=False), "zero points are not in the middle, and the configuration says symmetric"),
    ("other-order", GPTQ, other_order, f"{Q}: g_idx has inputs in another order than their groups', and"),
    ("int8-range", INT8, int8_of_four_bits, "integers are outside of 4 bits"),
    ("method", AWQ, awq_method_gone, "the quantization settings have no quant_method"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "edit", "reason"), [row[1:] for row in SEEDED], ids=[row[0] for row in SEEDED])
def test_a_seeded_defect_is_told(
    cache: Path, tmp_path: Path, words: tuple[str, ...], edit: Callable[..., None], reason: str
) -> None:
    found = flaws(edited(made(cache, *words).path, tmp_path / "copy", edit))

    assert any(reason in text for text in found), found


def test_a_reason_is_told_once_with_three_names(cache: Path, tmp_path: Path) -> None:
    """Fourteen modules with a wrong group size: one sentence, also where their shapes differ."""
    found = flaws(edited(made(cache, *GPTQ).path, tmp_path / "copy", settings_of(group_size=32)))

    assert 2 == len(found)  # of scales and of zero points
    assert found[0].startswith(
        "model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj and 11 more: scales is [4, 128]"
    )


def test_large_tensors_are_read_to_their_end(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces: a NaN in the last one is found, and where it is."""
    monkeypatch.setattr("quantdet.checkpoints.values._PIECE", 1000)

    def last(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][-1, -1] = np.nan
        tensors["model.embed_tokens.weight"][20, 0] = np.nan

    found = flaws(edited(made(cache, "plain", "bf16").path, tmp_path / "copy", last))
    assert ("model.embed_tokens.weight: NaN or infinity in 2 of 8192 values, first at 2560",) == found


# ------------------------------------------------------------------------------------------------------------------- files


def test_files_that_are_whole(cache: Path, tmp_path: Path) -> None:
    """With an index, without one, and beside a file that the index does not name and that has other names."""
    whole = made(cache, *GPTQ).path
    sharded(whole, tmp_path / "index")
    sharded(whole, tmp_path / "none", index=False)
    save({"tok_embeddings.weight": np.ones(3, np.float32)}, tmp_path / "index" / "consolidated.safetensors")

    assert () == flaws(tmp_path / "index") == flaws(tmp_path / "none")


def test_a_tensor_in_two_files(cache: Path, tmp_path: Path) -> None:
    """In files that are all read; one that the index does not name is read by nobody (`consolidated.safetensors`)."""
    for index in (True, False):
        folder = tmp_path / str(index)
        sharded(made(cache, *GPTQ).path, folder, index=index)
        save({f"{Q}.scales": np.ones((2, 128), np.float16)}, folder / "c.safetensors")

        told = any(f"{Q}.scales: stands in a.safetensors and c.safetensors" in text for text in flaws(folder))
        assert told is not index


def test_an_index_that_disagrees_with_its_files(cache: Path, tmp_path: Path) -> None:
    """A tensor that its file lacks, one in another file, one that the index does not name, a file that is not here."""
    folder = tmp_path / "copy"
    where = sharded(made(cache, *GPTQ).path, folder)
    first, last = sorted(where)[0], sorted(where)[-1]
    write_index(folder, {**where, "model.extra": "a.safetensors", first: "b.safetensors", "gone": "c.safetensors"} | {
        name: file for name, file in where.items() if name not in (first, last)
    })  # fmt: skip
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    del index[last]
    write_index(folder, index)

    found = flaws(folder)
    assert "model.safetensors.index.json names files that are not here: c.safetensors" in found
    assert "model.extra: is not in a.safetensors, where the index says that it is" in found
    assert f"{first}: stands in a.safetensors, and model.safetensors.index.json says b.safetensors" in found
    assert f"{last}: stands in b.safetensors, and model.safetensors.index.json does not name it" in found


def test_a_file_that_is_cut_off(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    sharded(made(cache, *GPTQ).path, folder, index=False)
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(whole[:-5])

    assert any(text.startswith("a.safetensors is no whole safetensors file: tensor ") for text in flaws(folder))


# -------------------------------------------------------------------------------------------------------- remembered, hostile


def test_what_was_found_is_remembered_for_the_same_tensors_and_settings(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(made(cache, *GPTQ).path, tmp_path / "copy", put(f"{Q}.scales", 0))
    known, sha256 = tmp_path / "known", tensors_sha256(folder)
    first = flaws(folder, sha256, known)
    other = edited(folder, tmp_path / "other", settings_of(group_size=32))
    assert first and len(flaws(other, sha256, known)) > len(first)  # other settings are not answered for

    monkeypatch.setattr("quantdet.checkpoints.values.zero_scales", lambda *_: "")
    assert first == flaws(folder, sha256, known) and () == flaws(folder)
    (file,) = [path for path in (known / ".flaws").iterdir() if json.loads(path.read_text()) == list(first)]
    file.write_text("nonsense", encoding="ascii")
    assert () == flaws(folder, sha256, known)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": "four"}, {"quant_method": "gptq", "bits": 0}, {"quant_method": ["gptq"]},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"(.+)+Z": {}}}, {"quant_method": "gptq", "bits": 4, "group_size": {}},
        {"quant_method": "compressed-tensors", "config_groups": [1]}, {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:("], "weights": {}}}},
        {"quant_method": "fp8", "weight_block_size": "all"}, {"quant_method": "awq", "bits": {}},
        {"quant_method": "awq", "modules_to_not_convert": {"a": 1}}, {"quant_method": "auto-round", "extra_config": [1]},
        {"quant_method": "modelopt", "quantization": {"quant_algo": 3}}, {"quant_method": "quark", "exclude": [1, None]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", [GPTQ, INT8])
def test_hostile_settings_raise_nothing(cache: Path, tmp_path: Path, words: tuple[str, ...], settings: dict[str, Any]) -> None:
    def as_said(_: dict[str, Any], given: dict[str, Any]) -> None:
        given.clear()
        given |= settings

    assert all(text.isprintable() for text in flaws(edited(made(cache, *words).path, tmp_path / "copy", as_said)))


def test_a_file_of_its_own_has_no_flaw_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert () == flaws(tmp_path / "x.gguf")
