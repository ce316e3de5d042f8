"""Every layout, read back from the written bytes by small readers that share no code with the writers."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantdet.checkpoints import Unavailable, altered, resolve, rounding
from quantdet.checkpoints.layouts import awq, packing
from quantdet.checkpoints.quantize import Quantized, largest, quantize, round_to_scale
from quantdet.checkpoints.tensors import load_folder, tensors_sha256
from quantdet.matrix.models import Model
from selftest.fakes.checkpoints import make_format

TINY = {
    "architecture": "qwen3", "seed": 3, "vocab_size": 64, "hidden_size": 192, "intermediate_size": 320,
    "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 32,
}  # fmt: skip
GROUP = 64
LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def make_model(**changes: Any) -> Model:
    synthetic = {**TINY, **changes}
    row = {"title": "x", "workload": "w", "formats": ["*"], "group_size": GROUP, "synthetic": synthetic}
    return Model.model_validate(row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")

    def get(layout: str, weights: str, activations: str = "none") -> Path:
        return resolve("tiny", make_model(), make_format(layout, weights, activations), cache=cache).path

    return get


# --------------------------------------------------------------------------------------------- readers, from the formats


def nibble_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, C] -> [R, C * 32 / bits], lowest bits first, one shift at a time."""
    raw = words.astype(np.int64) & 0xFFFFFFFF
    return np.stack([(raw >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)], axis=-1).reshape(len(words), -1)


def spread(scales: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(np.asarray(scales).astype(np.float64), group, axis=1)


def read_awq(t: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, ...]:
    undo = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])

    def columns(words: np.ndarray) -> np.ndarray:
        flat = nibble_rows(words, 4)
        return flat.reshape(len(words), -1, 8)[:, :, undo].reshape(len(words), -1)

    q, z = columns(t["qweight"]).T, columns(t["qzeros"]).T
    s, g = t["scales"].T, config["group_size"]
    assert (t["qweight"].dtype, t["scales"].dtype) == (np.int32, np.float16)
    return q, s, z, (q - np.repeat(z, g, axis=1)) * spread(s, g)


def read_gptq(t: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, ...]:
    bits = config["bits"]
    q = nibble_rows(np.ascontiguousarray(t["qweight"].T), bits)
    z = nibble_rows(t["qzeros"], bits).T + 1
    s = t["scales"].T
    assert t["g_idx"].dtype == np.int32 and s.dtype == np.float16
    return q, s, z, (q - z[:, t["g_idx"]]) * s.astype(np.float64)[:, t["g_idx"]]


def read_ct(t: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, ...]:
    group = config["config_groups"]["group_0"]
    args = group["weights"]
    bits, g = args["num_bits"], args.get("group_size")
    if group["format"] == "pack-quantized":
        q, s = nibble_rows(t["weight_packed"], bits), t["weight_scale"]
        assert list(t["weight_shape"]) == list(q.shape) and s.dtype == ml_dtypes.bfloat16
        if args["symmetric"]:
            z = np.full(s.shape, 2 ** (bits - 1))
        else:
            z = nibble_rows(np.ascontiguousarray(t["weight_zero_point"].T), bits).T
        return q, s, z, (q - np.repeat(z, g, axis=1)) * spread(s, g)
    if "weight_packed" in t:
        halves = np.stack([t["weight_packed"] & 15, t["weight_packed"] >> 4], axis=-1).reshape(len(t["weight_packed"]), -1)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[halves]
    else:
        values = t["weight"].astype(np.float64)
    s = t["weight_scale"]
    if s.dtype == np.uint8:
        return values, s, None, values * spread(2.0 ** (s.astype(np.float64) - 127), g)
    if "weight_global_scale" in t:
        return values, s, None, values * spread(s, g) / np.float64(t["weight_global_scale"][0])
    assert s.dtype == np.float32
    return values, s, None, values * s.astype(np.float64)


def read_fp8(t: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, ...]:
    q = t["weight"].astype(np.float64)
    if config.get("weight_block_size") == [128, 128]:
        s = t["weight_scale_inv"]
        tiles = np.repeat(np.repeat(s.astype(np.float64), 128, axis=0), 128, axis=1)
        return q, s, None, q * tiles[: q.shape[0], : q.shape[1]]
    assert t["weight_scale"].shape == ()
    return q, t["weight_scale"], None, q * np.float64(t["weight_scale"])


def read_bnb(t: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, ...]:
    if config["load_in_8bit"]:
        return t["weight"], t["SCB"], None, t["weight"] * t["SCB"].astype(np.float64)[:, None] / 127
    state = json.loads(t["weight.quant_state.bitsandbytes__nf4"].tobytes())
    assert t["weight"].shape == (np.prod(state["shape"]) // 2, 1) and state["quant_type"] == "nf4"
    packed = t["weight"].reshape(-1)
    q = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    values = t["weight.quant_map"].astype(np.float64)[q] * np.repeat(t["weight.absmax"].astype(np.float64), state["blocksize"])
    return q.reshape(state["shape"]), t["weight.absmax"], None, values.reshape(state["shape"])


READERS = {"awq": read_awq, "gptq": read_gptq, "ct": read_ct, "fp8": read_fp8, "bnb": read_bnb}

# layout, weights, activations, largest error as a fraction of the largest magnitude that shares a scale.
CASES = [
    ("awq", "int4-asym", "none", 0.10), ("gptq", "int4-sym", "none", 0.08), ("gptq", "int8-sym", "none", 0.006),
    ("ct", "int4-sym", "none", 0.08), ("ct", "int4-asym", "none", 0.10), ("ct", "int8-sym", "none", 0.006),
    ("ct", "int8-asym", "none", 0.007), ("ct", "int8-channel", "int8", 0.004), ("ct", "fp8-channel", "fp8", 0.036),
    ("ct", "fp8-channel", "none", 0.036), ("ct", "nvfp4", "none", 0.18), ("ct", "nvfp4", "fp4", 0.18),
    ("ct", "mxfp4", "none", 0.26), ("ct", "mxfp8", "mxfp8", 0.13), ("fp8", "fp8-tensor", "fp8", 0.036),
    ("fp8", "fp8-block", "fp8", 0.036), ("bnb", "nf4", "none", 0.16), ("bnb", "bnb-int8", "int8", 0.004),
]  # fmt: skip


def modules(path: Path) -> dict[str, dict[str, np.ndarray]]:
    tensors = load_folder(path)
    found: dict[str, dict[str, np.ndarray]] = {}
    for linear in LINEARS:
        prefix = f"model.layers.0.{linear}."
        found[linear] = {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}
    return found


def originals(folder: Any) -> dict[str, np.ndarray]:
    return {linear: t["weight"].astype(np.float32) for linear, t in modules(folder("plain", "bf16")).items()}


def read(folder: Any, layout: str, weights: str, activations: str) -> dict[str, tuple[np.ndarray, ...]]:
    path = folder(layout, weights, activations)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return {linear: READERS[layout](t, config) for linear, t in modules(path).items()}


def numbers(q: Quantized) -> np.ndarray:
    """The weight that the quantizer's numbers mean, in float64."""
    codes = q.codes.astype(np.float64)
    if q.weights in ("nvfp4", "mxfp4"):
        codes = q.codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = q.scales.astype(np.float64)
    if q.weights in ("mxfp4", "mxfp8"):
        scales = np.exp2(scales - 127)
    if q.weights == "nf4":
        table = [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]  # fmt: skip
        codes = np.array(table, np.float32).astype(np.float64)[q.codes]
        return (codes.reshape(-1, 64) * scales[:, None]).reshape(codes.shape)
    if q.weights == "bnb-int8":
        return codes * scales / 127
    if q.weights == "fp8-block":
        return codes * np.kron(scales, np.ones((128, 128)))[: codes.shape[0], : codes.shape[1]]
    if q.zero_points is not None:
        codes = codes - spread(q.zero_points, q.group or 0)
    if q.group is not None:
        scales = spread(scales, q.group)
    return codes * scales / (1.0 if q.global_scale is None else np.float64(q.global_scale))


@pytest.mark.parametrize(("layout", "weights", "activations", "step"), CASES)
def test_written_bytes_mean_the_quantizers_numbers(
    folder: Any, layout: str, weights: str, activations: str, step: float
) -> None:
    exact = originals(folder)
    for linear, (_, _, _, value) in read(folder, layout, weights, activations).items():
        w = exact[linear]
        amax = None
        if weights in ("fp8-tensor", "nvfp4"):
            fused = next((f for f in ("qkv", ("gate", "up")) if linear.split(".")[1][:-5] in f), None)
            shared = [x for x in exact if fused and x.split(".")[1][:-5] in fused] or [linear]
            amax = max(largest(exact[x]) for x in shared)
        np.testing.assert_array_equal(value, numbers(quantize(weights, w, group=GROUP, amax=amax)))
        assert np.abs(value - w).max() <= step * (amax or largest(w))
        assert np.abs(value - w).max() > 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("gptq", "int4-sym"), ("ct", "int4-sym")),
        (("gptq", "int8-sym"), ("ct", "int8-sym")),
        (("awq", "int4-asym"), ("ct", "int4-asym")),
    ],
)
def test_layouts_of_one_word_carry_the_same_integers_scales_and_zeros(folder: Any, one: Any, other: Any) -> None:
    a, b = read(folder, *one, "none"), read(folder, *other, "none")
    for linear in LINEARS:
        for left, right in zip(a[linear], b[linear], strict=True):
            np.testing.assert_array_equal(left.astype(np.float64), right.astype(np.float64))


@pytest.mark.parametrize(("layout", "weights", "activations", "step"), CASES)
def test_only_the_projections_are_changed(folder: Any, layout: str, weights: str, activations: str, step: float) -> None:
    plain, quantized = load_folder(folder("plain", "bf16")), load_folder(folder(layout, weights, activations))
    kept = [name for name in plain if not any(linear in name for linear in LINEARS)]
    assert len(kept) == 7
    for name in kept:
        assert quantized[name].dtype == ml_dtypes.bfloat16
        assert quantized[name].tobytes() == plain[name].tobytes()
    assert all(any(linear in name for linear in LINEARS) for name in quantized if name not in kept)


def test_activations_change_the_configuration_and_only_nvfp4s_tensors(folder: Any) -> None:
    def groups(path: Path) -> Any:
        return json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]

    weight_only, dynamic = folder("ct", "fp8-channel"), folder("ct", "fp8-channel", "fp8")
    assert groups(weight_only)["input_activations"] is None
    assert groups(dynamic)["input_activations"]["dynamic"] is True
    assert set(load_folder(weight_only)) == set(load_folder(dynamic))
    extra = set(load_folder(folder("ct", "nvfp4", "fp4"))) - set(load_folder(folder("ct", "nvfp4")))
    assert {name.rsplit(".", 1)[1] for name in extra} == {"input_global_scale"} and len(extra) == 7


def test_fused_projections_share_their_tensor_wide_scale(folder: Any) -> None:
    for word, name in ("nvfp4", "weight_global_scale"), ("fp8-tensor", "weight_scale"):
        found = modules(folder(*(("ct", word) if word == "nvfp4" else ("fp8", word, "fp8"))))
        scale = {linear.split(".")[1]: float(t[name].reshape(())) for linear, t in found.items()}
        assert scale["q_proj"] == scale["k_proj"] == scale["v_proj"]
        assert scale["gate_proj"] == scale["up_proj"]
        assert len(set(scale.values())) == 4


# ------------------------------------------------------------------------------------------------------ quantizer edges

WORDS = sorted({case[1] for case in CASES})


@pytest.mark.parametrize("word", WORDS)
def test_zeros_and_tiny_and_huge_weights_stay_finite(word: Any) -> None:
    w = np.zeros((64, 192), np.float32)
    w[1] = 2.0**-20
    w[2, 5] = 3.0e4
    w[3, ::2] = -1e-3
    value = numbers(quantize(word, w, group=GROUP))
    assert np.isfinite(value).all()
    assert not value[0].any()


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(word: Any, bad: float) -> None:
    w = np.ones((64, 192), np.float32)
    w[7, 11] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(word, w, group=GROUP)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scales_are_exact_in_float16_and_bfloat16(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    if not np.isfinite(value[0]) or value[0] < 0:
        return
    scale = round_to_scale(np.minimum(value, np.float32(6e4)))
    assert scale.astype(np.float16).astype(np.float32) == scale
    assert scale.astype(ml_dtypes.bfloat16).astype(np.float32) == scale
    assert scale[0] >= 2**-14


def test_int4_by_hand() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [0.7, -0.7, 0.31, -0.05]
    q = quantize("int4-sym", w, group=32)
    scale = np.float32(ml_dtypes.bfloat16(np.float32(0.7) / np.float32(7)))  # 0.10009765625
    assert q.scales.tolist() == [[scale]] and q.codes[0, :4].tolist() == [7, -7, 3, 0]
    a = quantize("int4-asym", w, group=32)
    assert a.zero_points is not None
    scale = np.float32(ml_dtypes.bfloat16(np.float32(1.4) / np.float32(15)))  # 0.09326171875; 0.7 / s = 7.506
    assert a.scales.tolist() == [[scale]] and a.zero_points.tolist() == [[8]]
    assert a.codes[0, :5].tolist() == [15, 0, 11, 7, 8]


def test_mx_exponents_at_powers_of_two() -> None:
    w = np.zeros((4, 32), np.float32)
    w[:, 0] = [1.0, np.nextafter(np.float32(1), np.float32(0)), 4.0, 6.0]
    assert (quantize("mxfp4", w, group=32).scales[:, 0].astype(int) - 127).tolist() == [-2, -3, 0, 0]
    assert (quantize("mxfp8", w, group=32).scales[:, 0].astype(int) - 127).tolist() == [-8, -9, -6, -6]


def test_fp8_casts_saturate_and_round_to_even() -> None:
    w = np.ones((128, 128), np.float32)
    w[0, :4] = [448.0, 17.0, 19.0, -448.0]  # 16, 18, 20 are neighbours: ties go to the even significand
    q = quantize("fp8-tensor", w, group=32)
    assert q.scales.tolist() == [1.0] and q.codes[0, :4].astype(float).tolist() == [448.0, 16.0, 20.0, -448.0]


FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


@pytest.mark.parametrize(("cast", "dtype", "top"), [(rounding.to_fp8, FP8, 448), (rounding.to_fp4, FP4, 6)])
def test_narrow_casts_are_those_of_ml_dtypes(cast: Any, dtype: Any, top: int) -> None:
    # Every value of the type, every tie between two of them, and all the neighbours of both in float32.
    codes = np.arange(256 if dtype is FP8 else 16, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / np.float32(2)])
    near = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    x = np.concatenate([points, *near, bits[np.isfinite(bits)], np.float32([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])])
    assert (
        cast(x).view(np.uint8).tobytes()
        == (
            np.clip(x, np.float32(-top), np.float32(top)).astype(dtype).view(np.uint8) & (0xFF if dtype is FP8 else 0xF)
        ).tobytes()
    )


@pytest.mark.parametrize("word", WORDS)
def test_quantizing_does_not_depend_on_the_blocks(word: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).standard_normal((300, 192)).astype(np.float32)
    whole = quantize(word, w, group=GROUP)
    monkeypatch.setattr("quantdet.checkpoints.quantize._CHUNK", 1000)
    parts = quantize(word, w, group=GROUP)
    for field in fields(Quantized):
        one, other = getattr(whole, field.name), getattr(parts, field.name)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), field.name
    rounded = w.astype(ml_dtypes.bfloat16)
    assert quantize(word, rounded, group=GROUP).codes.tobytes() == (
        quantize(word, rounded.astype(np.float32), group=GROUP).codes.tobytes()
    )


# -------------------------------------------------------------------------------------------------------------- packing


@settings(deadline=None)
@given(hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_transposed_by_strips(matrix: np.ndarray) -> None:
    np.testing.assert_array_equal(packing.transposed(matrix), matrix.T)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)), st.sampled_from([4, 8]))
def test_pack_round_trip(values: np.ndarray, bits: int) -> None:
    values = np.tile(values, (1, 32 // bits)) & np.uint8(2**bits - 1)
    np.testing.assert_array_equal(nibble_rows(packing.pack(values, bits), bits), values)


@settings(deadline=None)
@given(hnp.arrays(np.int8, (3, 8), elements=st.integers(-8, 7)))
def test_symmetric_codes_are_offset(codes: np.ndarray) -> None:
    assert (packing.unsigned(codes, 4).astype(int) == codes.astype(int) + 8).all()
    assert (packing.unsigned(codes, 8).astype(int) == codes.astype(int) + 128).all()


@settings(deadline=None)
@given(hnp.arrays(np.uint8, (16, 8), elements=st.integers(0, 15)))
def test_awq_order_round_trip(codes: np.ndarray) -> None:
    q = Quantized("int4-asym", codes, np.ones((16, 1), np.float32), 8, np.ones((16, 1), np.uint8))
    read_back, _, zeros, _ = read_awq(awq.encode(q, "none"), {"group_size": 8})
    np.testing.assert_array_equal(read_back, codes)
    assert (zeros == 1).all()


# ------------------------------------------------------------------------------------------------ altered, for controls

INTEGERS = [case[:3] for case in CASES if case[1].startswith("int")]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(("layout", "weights", "activations"), INTEGERS)
def test_one_integer_is_another_by_one(folder: Any, tmp_path: Path, layout: str, weights: str, activations: str) -> None:
    """Exactly one weight of one projection, unpacked; scales, zeros and every other tensor stay, and so does the original."""
    path = folder(layout, weights, activations)
    before, sha256 = contents(path), tensors_sha256(path)

    altered_path, altered_sha256, name = altered.one_integer(path, tmp_path)

    config = json.loads((altered_path / "config.json").read_text())["quantization_config"]
    changed = []
    for linear, tensors in modules(altered_path).items():
        own, other = (READERS[layout](t, config) for t in (modules(path)[linear], tensors))
        apart = np.flatnonzero(own[0].astype(np.int64) != other[0].astype(np.int64))
        changed += [(linear, abs(int(own[0].flat[at]) - int(other[0].flat[at]))) for at in apart]
        for one, another in zip(own[1:3], other[1:3], strict=True):
            assert (one is None and another is None) or np.array_equal(np.asarray(one), np.asarray(another))
    assert [(name.removeprefix("model.layers.0.").rpartition(".")[0], 1)] == changed
    untouched = {key: array.tobytes() for key, array in load_folder(path).items() if key != name}
    assert untouched == {key: array.tobytes() for key, array in load_folder(altered_path).items() if key != name}
    assert altered_sha256 == tensors_sha256(altered_path) != sha256
    assert before == contents(path)
    assert (altered_path, altered_sha256, name) == altered.one_integer(path, tmp_path)


@pytest.mark.parametrize("words", [("plain", "bf16"), ("ct", "fp8-channel", "fp8"), ("ct", "mxfp4"), ("bnb", "nf4")])
def test_without_integers_none_can_be_changed(folder: Any, tmp_path: Path, words: Any) -> None:
    """Codes of narrow floats are bytes too, and one more of a code is no 1 more."""
    with pytest.raises(Unavailable, match="one integer: need a projection of stored integers, have none in"):
        altered.one_integer(folder(*words), tmp_path)


def test_the_same_weights_under_another_name(folder: Any, tmp_path: Path) -> None:
    """Another folder with the same files and the same hash; the original keeps its record."""
    path = folder("gptq", "int4-sym")
    before = contents(path)

    copy, sha256 = altered.renamed(path, tmp_path)

    assert (copy.parent, tensors_sha256(path)) == (tmp_path, sha256)
    assert {name for name in before if name != "checkpoint.json"} <= set(contents(copy))
    assert before == contents(path)
    assert all(contents(copy)[name] == text for name, text in before.items() if name != "checkpoint.json")
    assert (copy, sha256) == altered.renamed(path, tmp_path)
