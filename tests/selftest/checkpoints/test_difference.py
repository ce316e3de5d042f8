"""Two checkpoints of one base, compared by their numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet.checkpoints.difference import difference
from selftest.fakes.edited import LAYOUTS, Q1, Q, edited, made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("layout", "weights", "activations"), LAYOUTS[:-2])
def test_a_checkpoint_and_itself(cache: Path, layout: str, weights: str, activations: str) -> None:
    whole = made(cache, layout, weights, activations).path
    found = difference(whole, whole)
    modules = 0 if layout == "plain" else 14
    assert found.same and str(found).startswith(f"the same numbers in {modules} quantized modules and ")


def test_two_layouts_of_the_same_numbers(cache: Path) -> None:
    found = difference(made(cache, "gptq", "int4-sym").path, made(cache, "ct", "int4-sym").path)
    assert found.same and len(found.modules) == 14 and found.plain == 11


def test_integers_scales_and_zero_points(cache: Path, tmp_path: Path) -> None:
    """How many, in how many modules, and by how much at most."""
    whole = made(cache, "awq", "int4-asym").path

    def other(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[f"{Q}.qweight"][0, 0] ^= 0x00000304  # two of them
        tensors[f"{Q1}.qweight"][0, 0] ^= 0x1
        tensors[f"{Q}.scales"][1, 2] *= np.float16(2)
        tensors[f"{Q}.qzeros"][0, 0] ^= 1

    found = difference(whole, edited(whole, tmp_path / "copy", other))
    apart = {one.name: one for one in found.modules if not one.same}
    assert apart.keys() == {Q, Q1} and not found.same
    assert (apart[Q].codes, apart[Q].codes_apart, apart[Q].scales, apart[Q].scales_apart) == (128 * 128, 2, 256, 1)
    assert apart[Q].largest_relative == 0.5 and apart[Q].others == ("zero points",)
    assert apart[Q].largest_step in (3, 4) and apart[Q1].largest_step == 1 and apart[Q1].others == ()
    most = apart[Q].largest_step
    assert str(found) == (
        f"other integers: 0.00102 % of 295 k in 2 of 14 modules differ, at most by {most}; "
        "scales differ in 1 of 14 (0.0217 % of 4.61 k, by 0.5 of the larger one at most); zero points differ in 1 of 14; "
        "the rest is equal"
    )


def test_codes_of_narrow_floats_have_no_step(cache: Path, tmp_path: Path) -> None:
    """FP8 by bytes, FP4 by halves of them."""
    for words, name, bits in ((("ct", "fp8-channel", "fp8"), "weight", 3), (("ct", "nvfp4"), "weight_packed", 0x11)):
        whole = made(cache, *words).path

        def other(tensors: dict[str, Any], _: dict[str, Any], name: str = name, bits: int = bits) -> None:
            tensors[f"{Q}.{name}"].reshape(-1).view(np.uint8)[0] ^= np.uint8(bits)

        found = difference(whole, edited(whole, tmp_path / name, other))
        (apart,) = [one for one in found.modules if not one.same]
        assert (apart.codes, apart.codes_apart, apart.largest_step) == (128 * 128, 2 if bits == 0x11 else 1, None)
        assert str(found).startswith("other codes: ")


def test_what_is_not_in_the_projections(cache: Path, tmp_path: Path) -> None:
    """Activations, modules that one has quantized, other tensors, the KV cache."""
    whole = made(cache, "ct", "int8-channel", "int8").path

    def other(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
        settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].astype(np.float32)
        del tensors[f"{Q}.weight_scale"]
        tensors["model.norm.weight"][0] *= 2
        tensors["model.extra"] = np.ones(1, np.float32)

    found = difference(whole, edited(whole, tmp_path / "copy", other))
    assert (found.only_a, found.only_b, found.plain_apart) == ((Q,), (), ("model.norm.weight",))
    assert (found.plain_only_a, found.plain_only_b) == ((), ("model.extra",))
    assert str(found) == (
        "activations' schemes differ in 13 of 13; the KV cache is quantized differently; quantized in the first only: "
        f"{Q}; unquantized tensors that differ: model.norm.weight; unquantized tensors of the second only: model.extra; "
        "the rest is equal"
    )


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (("gptq", "int4-sym"), ("gptq", "int8-sym"), "other numerics in 14 of 14 modules (4 bit against 8 bit)"),
        (("ct", "int4-sym"), ("ct", "nvfp4"), "(4 bit against nvfp4-pack-quantized)"),
        (("fp8", "fp8-tensor", "fp8"), ("fp8", "fp8-block", "fp8"), "(scales [1, 1] against [1, 2])"),
    ],
)
def test_other_numerics(cache: Path, one: tuple[str, ...], other: tuple[str, ...], words: str) -> None:
    found = difference(made(cache, *one).path, made(cache, *other).path)
    assert words in str(found) and not found.same


def test_the_side_that_is_not_decoded_is_named(cache: Path, tmp_path: Path) -> None:
    plain, bnb = made(cache, "gptq", "int4-sym").path, made(cache, "bnb", "nf4").path
    assert str(difference(plain, bnb)) == "not compared: the second is not decoded: method 'bitsandbytes'"
    assert str(difference(bnb, plain)).startswith("not compared: the first is not decoded: ")
    assert not difference(bnb, bnb).same

    def cut(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[f"{Q}.scales"] = tensors[f"{Q}.scales"][:1]

    found = difference(plain, edited(plain, tmp_path / "cut", cut))
    assert found.not_decoded.startswith(f"the second is not decoded: {Q}: ") and not found.same
