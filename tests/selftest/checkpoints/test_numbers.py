"""Which numbers a checkpoint holds: the same digest in every layout that carries them, another for any other number."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.checkpoints import altered, numbers, resolve
from quantdet.checkpoints.decoding import NotDecoded, decoder, unpacked
from quantdet.checkpoints.layouts import awq, packing
from quantdet.checkpoints.tensors import load_folder, save, tensors_sha256
from quantdet.matrix.models import Model
from selftest.fakes.checkpoints import make_format

SPEC = {
    "architecture": "qwen3", "seed": 3, "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
    "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 32,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


def made(cache: Path, layout: str, weights: str, activations: str = "none", seed: int = 3, group: int = 64) -> Any:
    model = {
        "title": "x", "workload": "w", "formats": ["*"], "group_size": group,
        "synthetic": {**SPEC, "seed": seed},
    }  # fmt: skip
    return resolve("tiny", Model.model_validate(model), make_format(layout, weights, activations), cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def told(folder: Path) -> str:
    return numbers.of(folder, tensors_sha256(folder))


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """The numbers of a copy of `source` whose tensors and quantization settings `edit` has changed."""
    target.mkdir()
    tensors = {name: np.array(array) for name, array in load_folder(source).items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    edit(tensors, config.get("quantization_config", {}))
    save(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return told(target)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("gptq", "int4-sym"), ("ct", "int4-sym")),
        (("gptq", "int8-sym"), ("ct", "int8-sym")),
        (("awq", "int4-asym"), ("ct", "int4-asym")),
    ],
)
def test_the_same_numbers_in_two_layouts(cache: Path, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Other tensors, other dtypes of scales, another order of packing: one digest, which is decoded and not a label's."""
    a, b = made(cache, *one), made(cache, *other)

    assert a.sha256 != b.sha256
    assert a.numbers == b.numbers and a.numbers.startswith("decoded:")


def test_what_differs_has_another_digest(cache: Path) -> None:
    """Bits, zero points, groups, activations, the makers' weights (here: the seed): no two are the same numbers."""
    rows: list[tuple[Any, ...]] = [
        ("plain", "bf16"), ("gptq", "int4-sym"), ("awq", "int4-asym"), ("gptq", "int8-sym"), ("ct", "int8-asym"),
        ("ct", "int8-channel", "int8"), ("ct", "fp8-channel", "fp8"), ("ct", "fp8-channel"), ("fp8", "fp8-tensor", "fp8"),
        ("fp8", "fp8-block", "fp8"), ("ct", "nvfp4"), ("ct", "nvfp4", "fp4"), ("ct", "mxfp4"), ("ct", "mxfp8", "mxfp8"),
        ("gptq", "int4-sym", "none", 4), ("gptq", "int4-sym", "none", 3, 32), ("bnb", "nf4"), ("bnb", "bnb-int8", "int8"),
    ]  # fmt: skip
    found = [made(cache, *row).numbers for row in rows]

    assert len(rows) == len(set(found))
    assert ["bytes", "bytes"] == [text.partition(":")[0] for text in found[-2:]]
    assert {"decoded"} == {text.partition(":")[0] for text in found[:-2]}


@pytest.mark.parametrize("layout", ["gptq", "ct"])
def test_one_integer_is_another_number(cache: Path, layout: str) -> None:
    """The control's seeded defect: one stored integer is another by 1."""
    whole = made(cache, layout, "int4-sym")
    path, _, _ = altered.one_integer(whole.path, cache)

    assert told(path) != whole.numbers


@pytest.mark.parametrize(
    ("layout", "weights", "tensor"),
    [
        ("gptq", "int4-sym", f"{Q}.scales"), ("awq", "int4-asym", f"{Q}.scales"), ("awq", "int4-asym", f"{Q}.qzeros"),
        ("gptq", "int4-sym", f"{Q}.qzeros"), ("ct", "int4-asym", f"{Q}.weight_zero_point"),
        ("ct", "int4-sym", f"{Q}.weight_scale"),
        ("ct", "fp8-channel", f"{Q}.weight"), ("ct", "nvfp4", f"{Q}.weight_global_scale"), ("ct", "mxfp4", f"{Q}.weight_scale"),
        ("fp8", "fp8-block", f"{Q}.weight_scale_inv"), ("gptq", "int4-sym", "model.norm.weight"),
        ("gptq", "int4-sym", "model.embed_tokens.weight"), ("gptq", "int4-sym", f"{Q}.g_idx"),
    ],
)  # fmt: skip
def test_every_tensor_counts(cache: Path, tmp_path: Path, layout: str, weights: str, tensor: str) -> None:
    """One bit of any tensor."""
    activations = "fp8" if layout == "fp8" else "none"
    whole = made(cache, layout, weights, activations)

    def flip(tensors: dict[str, Any], _: Any) -> None:
        flat = tensors[tensor].reshape(-1).view(np.uint8)
        flat[0] ^= 1

    assert edited(whole.path, tmp_path / "copy", flip) != whole.numbers
    assert edited(whole.path, tmp_path / "same", lambda *_: None) == whole.numbers


def test_a_layout_says_the_same_in_other_words(cache: Path, tmp_path: Path) -> None:
    """GPTQ of version 2, without g_idx, with biases of zeros, scales in float32, norms in float32: the same numbers."""
    whole = made(cache, "gptq", "int4-sym")

    def other(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["checkpoint_format"] = "gptq_v2"
        for name in list(tensors):
            if name.endswith(".qzeros"):  # 7 of version 1 means 8
                tensors[name] = np.full_like(tensors[name], np.int32(-2004318072))  # 0x88888888
            if name.endswith(".g_idx"):
                del tensors[name]
            if name.endswith(".scales"):
                tensors[name.replace("scales", "bias")] = np.zeros(tensors[name].shape[1], np.float16)
                tensors[name] = tensors[name].astype(np.float32)
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name].astype(np.float32)

    assert edited(whole.path, tmp_path / "copy", other) == whole.numbers

    def biased(tensors: dict[str, Any], _: Any) -> None:
        tensors[f"{Q}.bias"] = np.ones(128, np.float16)

    assert edited(whole.path, tmp_path / "biased", biased) != whole.numbers


def test_the_order_of_inputs_counts(cache: Path, tmp_path: Path) -> None:
    """act-order: which group an input belongs to is part of the numbers."""
    whole = made(cache, "gptq", "int4-sym")

    def reorder(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["desc_act"] = True
        tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"][::-1].copy()

    assert edited(whole.path, tmp_path / "copy", reorder) != whole.numbers


@pytest.mark.parametrize(
    "settings",
    [
        {"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}},
        {"input_activations": None},
    ],
)
def test_the_scheme_of_activations_counts(cache: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The same integers with other activations are other numerics."""
    whole = made(cache, "ct", "int8-channel", "int8")

    def change(_: Any, given: dict[str, Any]) -> None:
        given["config_groups"]["group_0"] |= settings

    assert edited(whole.path, tmp_path / "copy", change) != whole.numbers


def test_groups_of_modules_have_their_own_schemes(cache: Path, tmp_path: Path) -> None:
    """compressed-tensors with two groups: a module is read by the one that names it."""
    whole = made(cache, "ct", "int8-channel", "int8")

    def split(tensors: dict[str, Any], given: dict[str, Any]) -> None:
        group = given["config_groups"]["group_0"]
        given["config_groups"]["group_1"] = {**group, "targets": ["re:.*self_attn.*"], "input_activations": None}

    def twice(tensors: dict[str, Any], given: dict[str, Any]) -> None:
        given["config_groups"]["group_1"] = {**given["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"]}

    assert edited(whole.path, tmp_path / "one", split) != whole.numbers
    assert edited(whole.path, tmp_path / "two", twice) == whole.numbers


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "quip"}, {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"(.+)+Z": {}}}, {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"quant_method": "awq", "version": "gemv"},
    ],
)  # fmt: skip
def test_what_is_not_decoded_is_known_by_its_bytes(cache: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Copies are the same; what another maker wrote is not, whatever it is called."""
    whole = made(cache, "gptq", "int4-sym")

    def as_said(_: Any, given: dict[str, Any]) -> None:
        given.clear()
        given |= settings

    one, two = (edited(whole.path, tmp_path / name, as_said) for name in ("one", "two"))

    def other(tensors: dict[str, Any], given: dict[str, Any]) -> None:
        as_said(tensors, given)
        tensors["model.norm.weight"] += np.ones((), tensors["model.norm.weight"].dtype)

    assert one == two and one.startswith("bytes:")
    assert edited(whole.path, tmp_path / "three", other) != one


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": None}, {"quant_method": "gptq", "bits": "four"}, {"quant_method": ["gptq"]},
        {"quant_method": "compressed-tensors"}, {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": None}}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:("], "weights": {}}}},
        {"quant_method": "fp8", "weight_block_size": "all"}, {"quant_method": "awq", "bits": {}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["gptq", "ct"])
def test_settings_that_do_not_fit_cost_no_cell(cache: Path, tmp_path: Path, layout: str, settings: dict[str, Any]) -> None:
    """Whatever somebody wrote into config.json: the numbers are known by their bytes, and nothing is raised."""
    whole = made(cache, layout, "int4-sym")

    def as_said(_: Any, given: dict[str, Any]) -> None:
        given.clear()
        given |= settings

    assert edited(whole.path, tmp_path / "copy", as_said).startswith("bytes:")


def test_tensors_that_a_layout_does_not_have_are_not_passed_over(cache: Path, tmp_path: Path) -> None:
    """An unknown tensor beside the known ones of a projection: known by its bytes."""
    whole = made(cache, "gptq", "int4-sym")

    def add(tensors: dict[str, Any], _: Any) -> None:
        tensors[f"{Q}.codebook"] = np.zeros(4, np.float16)

    assert edited(whole.path, tmp_path / "copy", add).startswith("bytes:")


def test_settings_stand_in_several_files(cache: Path, tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json says the same as config.json."""
    whole = made(cache, "gptq", "int4-sym")
    folder = tmp_path / "copy"
    shutil.copytree(whole.path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = config.pop("quantization_config")
    del own["quant_method"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(own), encoding="utf-8")

    assert told(folder) == whole.numbers


@pytest.mark.parametrize(
    ("file", "place"), [("config.json", "compression_config"), ("config.json", "text_config"), ("quant_config.json", "")]
)
def test_settings_of_other_makers_are_found(cache: Path, tmp_path: Path, file: str, place: str) -> None:
    """compressed-tensors' older name, a model with vision, AutoAWQ's file: the same numbers as in transformers' place."""
    whole = made(cache, "ct", "int8-channel", "int8")
    folder = tmp_path / "copy"
    shutil.copytree(whole.path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = config.pop("quantization_config")
    inside = {"compression_config": {place: own}, "text_config": {place: {"quantization_config": own}}, "": own}[place]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / file).write_text(json.dumps(config | inside if place else inside), encoding="utf-8")

    assert told(folder) == whole.numbers


def test_quantized_tensors_without_settings_are_known_by_their_bytes(cache: Path, tmp_path: Path) -> None:
    """Nobody says how activations are quantized: not taken for weight-only, nor for unquantized."""
    whole = made(cache, "ct", "int8-channel", "int8")
    folder = tmp_path / "copy"
    shutil.copytree(whole.path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    assert told(folder).startswith("bytes:")


def test_what_is_no_number_does_not_count(cache: Path, tmp_path: Path) -> None:
    """A buffer that follows from the configuration, null and -1 where others write nothing, capitals."""
    whole = made(cache, "ct", "int8-channel", "int8")

    def other(tensors: dict[str, Any], given: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        given["config_groups"]["group_0"]["input_activations"] |= {"type": "INT", "group_size": -1, "symmetric": None}

    assert edited(whole.path, tmp_path / "copy", other) == whole.numbers


def test_zero_points_in_the_middle_are_those_of_a_symmetric_set(cache: Path, tmp_path: Path) -> None:
    """compressed-tensors with zero points that are all 8, and without any."""
    whole = made(cache, "ct", "int4-sym")

    def explicit(tensors: dict[str, Any], _: Any) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            rows, groups = tensors[name].shape
            zeros = np.full((rows // 8, groups), -2004318072, np.int32)  # 0x88888888
            tensors[name.replace("weight_scale", "weight_zero_point")] = zeros

    assert edited(whole.path, tmp_path / "copy", explicit) == whole.numbers


def test_a_pattern_that_never_ends_is_not_tried(cache: Path, tmp_path: Path) -> None:
    """Targets come from somebody else's config.json; such a one is known by its bytes, at once."""
    whole = made(cache, "ct", "int8-channel", "int8")

    def hostile(_: Any, given: dict[str, Any]) -> None:
        given["config_groups"]["group_0"]["targets"] = ["re:(.+)+Z$"]

    assert edited(whole.path, tmp_path / "copy", hostile).startswith("bytes:")


def test_many_remember_at_once(cache: Path, tmp_path: Path) -> None:
    """Threads and processes that ask for one checkpoint: none gets in another's way, nothing half-written stays."""
    whole = made(cache, "gptq", "int4-sym")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: numbers.of(whole.path, whole.sha256, tmp_path), range(64)))

    assert {whole.numbers} == found
    assert 1 == len(list((tmp_path / ".numbers").iterdir()))
    (tmp_path / "file").write_text("", encoding="ascii")
    assert whole.numbers == numbers.of(whole.path, whole.sha256, tmp_path / "file")  # no folder can be made there


def test_a_digest_is_remembered_and_follows_its_checkpoint(cache: Path, tmp_path: Path) -> None:
    """The cache is asked by hashes, so that it cannot answer for another checkpoint; what it cannot read is made again."""
    whole = made(cache, "gptq", "int4-sym")
    known = tmp_path / "known"
    first = numbers.of(whole.path, whole.sha256, known)
    (file,) = (known / ".numbers").glob("*.txt")

    file.write_text(f"decoded:{'0' * 64}", encoding="ascii")
    assert numbers.of(whole.path, whole.sha256, known).endswith("0" * 64)  # remembered, not read again
    assert numbers.of(whole.path, "2" * 64, known) == first  # another checkpoint's tensors are not answered for
    file.write_text("nonsense", encoding="ascii")
    assert first == numbers.of(whole.path, whole.sha256, known) == file.read_text(encoding="ascii")


def test_what_an_engine_makes_of_plain_weights_is_not_the_plain_numbers() -> None:
    """Quantized while loading: other numbers than the plain ones, and others for each way."""
    plain = f"decoded:{'1' * 64}"
    ways = [numbers.online(plain, {"weights": word}) for word in ("int4-torchao", "int8-torchao")]

    assert 3 == len({plain, *ways}) and all(way.startswith("online:") for way in ways)


def test_unpacking_is_the_inverse_of_packing() -> None:
    """Of 2, 4 and 8 bits, and of AWQ's order."""
    for bits in (4, 8):
        values = np.random.default_rng(0).integers(0, 2**bits, (3, 16), dtype=np.uint8)
        assert np.array_equal(values, unpacked(packing.pack(values, bits), bits))
    assert [0, 1, 2, 3] * 4 == unpacked(np.array([[-454761244]], np.int32), 2)[0].tolist()  # 0xE4E4E4E4
    assert (0, 2, 4, 6, 1, 3, 5, 7) == awq.ORDER


def test_scales_of_any_dtype_are_one_number(cache: Path, tmp_path: Path) -> None:
    """bfloat16 and float32 scales of compressed-tensors with the same values."""
    whole = made(cache, "ct", "int4-sym")

    def widen(tensors: dict[str, Any], _: Any) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                assert tensors[name].dtype == ml_dtypes.bfloat16
                tensors[name] = tensors[name].astype(np.float32)

    assert edited(whole.path, tmp_path / "copy", widen) == whole.numbers


def test_methods_without_a_decoder_say_so() -> None:
    with pytest.raises(NotDecoded, match="torchao"):
        decoder({"quant_method": "torchao"})
    with pytest.raises(NotDecoded, match="sparsity"):
        decoder({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}})
