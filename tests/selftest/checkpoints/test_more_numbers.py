"""The same numbers from other makers: rules of single modules, auto-round, Quark, ModelOpt, int4 stored as int8, 3 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet.checkpoints import numbers
from quantdet.checkpoints.decoding import unpacked
from quantdet.checkpoints.layouts.packing import pack
from quantdet.checkpoints.tensors import tensors_sha256
from selftest.fakes.edited import Q1, Q, edited, made

# Digests are compared over years: these were made before the layouts below were decoded.
KNOWN = {
    ("plain", "bf16", "none"): "d260f8783001f6607b79489b5a85c5a6b6c211fe08610c3dcd7bbeacc963ee61",
    ("gptq", "int4-sym", "none"): "3fb007fc532b4eb9141bfe65fae002d54a318441be78bea42216dd16f4a269f6",
    ("awq", "int4-asym", "none"): "a08e4a3f8bb6f2abe1d8d09a73d4eb0834de02350e58997fa135162425617f11",
    ("ct", "int8-channel", "int8"): "2d46dd70f8785707ff474c8e7a288c7853db1f960110958420b57466f58f44f1",
    ("ct", "nvfp4", "fp4"): "d39d85a18f5978ef39c445ef008d7a1254becb8abfe4f336e5fa1cd78c62e0da",
    ("fp8", "fp8-block", "fp8"): "113746c241ec26784b1ae68f96036f7931966e8b7942e6dbc06ca827b20198f5",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def told(folder: Path) -> str:
    return numbers.of(folder, tensors_sha256(folder))


@pytest.mark.parametrize("words", KNOWN, ids="-".join)
def test_digests_stay(cache: Path, words: tuple[str, str, str]) -> None:
    assert f"decoded:{KNOWN[words]}" == made(cache, *words, layers=1).numbers


def auto_round(packing: str) -> Callable[..., None]:
    def edit(_: dict[str, Any], settings: dict[str, Any]) -> None:
        settings.clear()
        settings |= {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": packing == "gptq",
                     "packing_format": f"auto_round:auto_{packing}", "extra_config": {"lm_head": {"bits": 16}}}  # fmt: skip

    return edit


def by_rules(_: dict[str, Any], settings: dict[str, Any]) -> None:
    """8 bit for all but by a rule for each half: the modules are what they were."""
    settings["bits"] = 8
    settings["dynamic"] = {r"-:.*embed.*": {}, r"+:.*self_attn.*": {"bits": 4}, r".*mlp.*": {"bits": 4}}


def narrow_as_bytes(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    """int4 in int8, as kernels of W4A8 take it, for weights alone here."""
    group = settings["config_groups"]["group_0"]
    settings["format"] = group["format"] = "int-quantized"
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        values = unpacked(tensors.pop(name), 4)
        del tensors[name.replace("weight_packed", "weight_shape")]
        tensors[name.replace("_packed", "")] = (values.astype(np.int16) - 8).astype(np.int8)


def several_groups(_: dict[str, Any], settings: dict[str, Any]) -> None:
    group = settings["config_groups"]["group_0"]
    wrong = {**group, "weights": {**group["weights"], "num_bits": 8}}
    settings["config_groups"] = {"a": {**group, "targets": ["re:.*self_attn.*", "re:.*mlp.*"]}, "b": wrong}


def quark(kind: str, weights: str, inputs: str, *, is_dynamic: bool = True) -> Callable[..., None]:
    def edit(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings.clear()
        weight = {"dtype": kind, "qscheme": weights, "is_dynamic": False, "symmetric": True}
        acts = {"dtype": kind, "qscheme": inputs, "is_dynamic": is_dynamic, "symmetric": True}
        settings |= {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": acts},
                     "exclude": ["lm_head"], "export": {"kv_cache_group": []}}  # fmt: skip
        for name in tensors:
            if name.endswith(".weight_scale") and weights == "per_channel":
                tensors[name] = tensors[name].reshape(-1)

    return edit


def modelopt_channel(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    quark("fp8_e4m3", "per_channel", "per_channel")(tensors, settings)
    settings.clear()
    settings |= {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("words", "edit"),
    [
        (("gptq", "int4-sym"), auto_round("gptq")), (("awq", "int4-asym"), auto_round("awq")),
        (("gptq", "int4-sym"), by_rules), (("ct", "int4-sym"), narrow_as_bytes), (("ct", "int4-sym"), several_groups),
        (("ct", "int8-channel", "int8"), quark("int8", "per_channel", "per_channel")),
        (("ct", "fp8-channel", "fp8"), quark("fp8_e4m3", "per_channel", "per_channel")),
        (("ct", "fp8-channel", "fp8"), modelopt_channel),
        (("fp8", "fp8-tensor", "fp8"), quark("fp8_e4m3", "per_tensor", "per_tensor")),
    ],
)  # fmt: skip
def test_the_same_numbers_of_another_maker(
    cache: Path, tmp_path: Path, words: tuple[str, ...], edit: Callable[..., None]
) -> None:
    whole = made(cache, *words)

    def and_one_other(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        edit(tensors, settings)
        local = next(name for name in sorted(tensors) if name.startswith(f"{Q}.") and name.rpartition(".")[2] in (
            "qweight", "weight", "weight_packed"))  # fmt: skip
        tensors[local].reshape(-1).view(np.uint8)[0] ^= 1

    assert whole.numbers == told(edited(whole.path, tmp_path / "copy", edit))
    assert told(edited(whole.path, tmp_path / "other", and_one_other)) not in (whole.numbers, "")


@pytest.mark.parametrize("kind", ["NVFP4", "W4A16_NVFP4"])
def test_nvfp4_of_modelopt(cache: Path, tmp_path: Path, kind: str) -> None:
    """Its scale of a tensor multiplies, compressed-tensors' divides: the same where they are reciprocals, to the bit."""
    whole = made(cache, "ct", "nvfp4", "fp4" if kind == "NVFP4" else "none")

    def divides(value: float) -> Callable[..., None]:
        def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
            for name in tensors:
                if name.endswith("global_scale"):
                    tensors[name] = np.array([value], np.float32)

        return edit

    def multiplies(value: float) -> Callable[..., None]:
        def edit(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
            settings.clear()
            settings |= {"quant_method": "modelopt", "quant_algo": kind, "group_size": 16, "ignore": ["lm_head"]}
            for name in list(tensors):
                if name.endswith("weight_packed"):
                    tensors[name.replace("_packed", "")] = tensors.pop(name)
                elif name.endswith("weight_global_scale"):
                    del tensors[name]
                    tensors[name.replace("weight_global_scale", "weight_scale_2")] = np.array(value, np.float32)
                elif name.endswith("input_global_scale"):
                    del tensors[name]
                    tensors[name.replace("input_global_scale", "input_scale")] = np.array(value, np.float32)

        return edit

    one = told(edited(whole.path, tmp_path / "ct", divides(512.0)))
    assert one == told(edited(whole.path, tmp_path / "modelopt", multiplies(1 / 512))) and one.startswith("decoded:")
    assert one != told(edited(whole.path, tmp_path / "another", multiplies(1 / 511)))


@pytest.mark.parametrize(
    ("words", "edit"),
    [
        (("gptq", "int4-sym"), lambda _, settings: settings.update(group_size=32)),
        (("gptq", "int4-sym"), lambda _, settings: settings.update(dynamic={r"-:.*\.1\..*": {}})),
        (("gptq", "int4-sym"), lambda _, settings: settings.update(dynamic={".*q_proj": {"bits": 8}})),
        (("awq", "int4-asym"), lambda _, settings: settings.update(modules_to_not_convert=["q_proj"])),
        (("ct", "int4-sym"), lambda _, settings: settings.update(ignore=[Q])),
        (("ct", "int4-sym"), lambda _, settings: settings["config_groups"]["group_0"]["weights"].update(group_size=128)),
        (("fp8", "fp8-block", "fp8"), lambda _, settings: settings.update(ignored_layers=[Q1])),
        (("fp8", "fp8-tensor", "fp8"), lambda _, settings: settings.update(activation_scheme="static")),
    ],
)  # fmt: skip
def test_a_contradiction_is_like_no_other(
    cache: Path, tmp_path: Path, words: tuple[str, ...], edit: Callable[..., None]
) -> None:
    """Tensors that the settings contradict are known by their bytes: never the same as a whole checkpoint."""
    assert told(edited(made(cache, *words).path, tmp_path / "copy", edit)).startswith("bytes:")


def test_integers_of_three_bits(cache: Path, tmp_path: Path) -> None:
    """Packed over the ends of words, as GPTQ does: decoded, and every integer counts."""
    values = np.random.default_rng(0).integers(0, 8, (4, 64), dtype=np.uint8)
    words = np.packbits(np.unpackbits(values[..., None], axis=2, bitorder="little")[..., :3].reshape(4, -1), axis=1,
                        bitorder="little").view(np.int32)  # fmt: skip
    assert np.array_equal(values, unpacked(words, 3))
    whole = made(cache, "gptq", "int4-sym")

    def three(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["bits"] = 3
        for name in tensors:
            if name.endswith((".qweight", ".qzeros")):
                shape = tensors[name].shape
                rows, columns = (shape[0] * 3 // 4, shape[1]) if name.endswith(".qweight") else (shape[0], shape[1] * 3 // 4)
                tensors[name] = np.random.default_rng(1).integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)

    def other(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        three(tensors, settings)
        tensors[f"{Q}.qzeros"][0, -1] ^= np.int32(-(2**31))  # the last bit of the last zero point

    one, another = told(edited(whole.path, tmp_path / "a", three)), told(edited(whole.path, tmp_path / "b", other))
    assert one.startswith("decoded:") and another.startswith("decoded:") and one != another


def test_a_quantized_head_counts(cache: Path, tmp_path: Path) -> None:
    whole = made(cache, "gptq", "int4-sym")

    def head(value: int) -> Callable[..., None]:
        def edit(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
            settings["lm_head"] = True
            for local in ("qzeros", "scales", "g_idx"):
                tensors[f"lm_head.{local}"] = tensors[f"{Q}.{local}"]
            del tensors["lm_head.weight"]
            tensors["lm_head.qweight"] = pack(np.full((128, 128), value, np.uint8), 4).T.copy()

        return edit

    found = {told(edited(whole.path, tmp_path / str(value), head(value))) for value in (1, 2)} | {whole.numbers}
    assert 3 == len(found) and all(text.startswith("decoded:") for text in found)
