"""What a user's own checkpoint says of itself, and every mistake at once where it is none."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantdet.checkpoints import Unavailable, altered, numbers, resolve_described, resolve_own
from quantdet.checkpoints.described import Described, Mistaken, read
from quantdet.checkpoints.schemes import scheme
from quantdet.checkpoints.tensors import tensors_sha256
from quantdet.checkpoints.unchanged import changed, files_sha256
from quantdet.matrix.cell import ID_PATTERN
from quantdet.matrix.rows import CARRIES
from selftest.fakes.edited import LAYOUTS, made, sharded


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path, tmp_path: Path) -> Path:
    """A GPTQ checkpoint that may be changed."""
    target = tmp_path / "My Model-GPTQ"
    shutil.copytree(made(cache, "gptq", "int4-sym").path, target)
    return target


def config_of(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


SHORT = {
    "plain bf16 none": "bf16", "gptq int4-sym none": "gptq-int4-g64", "gptq int8-sym none": "gptq-int8-g64",
    "awq int4-asym none": "awq-int4-g64", "ct int4-sym none": "ct-int4-g64", "ct int4-asym none": "ct-int4-asym-g64",
    "ct int8-sym none": "ct-int8-g64", "ct int8-asym none": "ct-int8-asym-g64", "ct int8-channel int8": "ct-int8-w8a8",
    "ct fp8-channel fp8": "ct-fp8-channel", "ct fp8-channel none": "ct-fp8-channel-a16", "ct nvfp4 none": "ct-nvfp4-a16",
    "ct nvfp4 fp4": "ct-nvfp4", "ct mxfp4 none": "ct-mxfp4-a16", "ct mxfp8 mxfp8": "ct-mxfp8",
    "fp8 fp8-tensor fp8": "fp8-tensor",
    "fp8 fp8-block fp8": "fp8-block", "bnb nf4 none": "bnb-nf4", "bnb bnb-int8 int8": "bnb-int8",
}  # fmt: skip


@pytest.mark.parametrize("words", LAYOUTS, ids=" ".join)
def test_every_layout_in_the_words_of_the_matrix(cache: Path, tmp_path: Path, words: tuple[str, str, str]) -> None:
    """What the writer was asked for is what is read, and the letters are an id."""
    found = read(str(made(cache, *words).path), tmp_path)
    assert words == (found.layout, found.weights, found.activations)
    assert found.short == SHORT[" ".join(words)] and ID_PATTERN.fullmatch(found.short)


def test_all_that_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = read("My Model-GPTQ", tmp_path)
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert found == Described(
        path=folder, source="folder My Model-GPTQ", id="my-model-gptq", settings=told, settings_file="config.json",
        method="gptq", short="gptq-int4-g64",
        layout="gptq", weights="int4-sym", activations="none", group_size=64, declared_dtype="bfloat16", vocab_size=64,
        max_positions=4096, tokenizer=True, experts=False, size_bytes=(folder / "model.safetensors").stat().st_size,
        architecture="Qwen3ForCausalLM", kv_cache="",
    )  # fmt: skip
    assert found.dtype == "bfloat16" and replace(found, declared_dtype="float32").dtype == "bfloat16"
    assert replace(found, declared_dtype="float16").dtype == "float16" and replace(found, declared_dtype=None).dtype is None


def test_what_models_with_vision_say_inside(folder: Path, tmp_path: Path) -> None:
    text = {"vocab_size": 99, "max_position_embeddings": 77, "dtype": "float16", "num_experts": 8}
    config_of(folder, vocab_size=None, max_position_embeddings=None, torch_dtype=None, text_config=text)
    found = read(str(folder), tmp_path)
    assert (found.vocab_size, found.max_positions, found.declared_dtype, found.experts) == (99, 77, "float16", True)
    assert not found.tokenizer


def test_what_is_not_told_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    config_of(folder, vocab_size=None, max_position_embeddings=None, architectures=None, torch_dtype=None)
    found = read(str(folder), tmp_path)
    assert (found.vocab_size, found.max_positions, found.architecture) == (None, None, "")
    assert found.declared_dtype == "bfloat16"  # of most plain tensors' bytes


def test_names_become_ids(folder: Path, tmp_path: Path) -> None:
    """Of the repository in a hub's cache, whose folders are named by commits; never longer than 40 characters."""
    cached = tmp_path / "models--org--A_Model.v2" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    assert read(str(cached), tmp_path).id == "a_model.v2"
    long = tmp_path / f"{'x' * 39}-{'y' * 50}"
    cached.rename(long)
    assert read(str(long), tmp_path).id == "x" * 39
    strange = tmp_path / "---"
    long.rename(strange)
    assert read("---", tmp_path).id == "checkpoint"


GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True, "sym": True}
INT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def ct(*groups: tuple[dict[str, Any], dict[str, Any] | None], form: str) -> dict[str, Any]:
    made = {str(at): {"targets": ["Linear"], "weights": w, "input_activations": a} for at, (w, a) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": made}


@pytest.mark.parametrize(
    ("settings", "short", "words"),
    [
        (GPTQ, "gptq-int8-g32-actorder", ("gptq", "int8-sym", "none")),
        ({**GPTQ, "sym": False}, "gptq-int8-asym-g32-actorder", None),
        ({**GPTQ, "group_size": -1}, "gptq-int8-channel", ("gptq", "int8-sym", "none")),
        ({**GPTQ, "bits": 3}, "gptq-int3-g32-actorder", None), ({**GPTQ, "dynamic": {".*x": {"bits": 4}}}, "gptq-mixed", None),
        ({**GPTQ, "dynamic": {"-:.*x": {}}}, "gptq-int8-g32-actorder", ("gptq", "int8-sym", "none")),
        ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq-int4-g128",
         ("awq", "int4-asym", "none")),
        ({"quant_method": "intel/auto-round", "bits": 4, "group_size": 128, "sym": True,
          "packing_format": "auto_round:auto_gptq"}, "autoround-int4-g128", ("gptq", "int4-sym", "none")),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:x"}, "auto-round", None),
        (ct(({**INT, "num_bits": 4}, TOKEN), form="int-quantized"), "ct-int4-w4a8", None),
        (ct((INT, {**TOKEN, "strategy": "tensor", "dynamic": False}), form="int-quantized"), "ct-int8-w8a8-static", None),
        (ct((INT, TOKEN), ({**INT, "num_bits": 4}, None), form="mixed-precision"), "ct-mixed", None),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}, "ct-kv", None),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, "fp8-block-1x128", None),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8-tensor-static", ("fp8", "fp8-tensor", "fp8")),
        ({"quant_algo": "NVFP4", "group_size": 16}, "modelopt-nvfp4", None),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, "quark-fp8-e4m3", None),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
         "bnb-nf4-nested", None),
        ({"quant_method": "mxfp4"}, "mxfp4", None), ({"quant_method": "\u202eodd ../name"}, "odd----name", None),
        ({"quant_method": "gptq", "bits": "many"}, "gptq", None), ({"some": "thing"}, "quantized", None),
    ],
)  # fmt: skip
def test_schemes_in_a_few_letters(settings: dict[str, Any], short: str, words: tuple[str, ...] | None) -> None:
    """Words of the matrix only for what its rows mean; letters that an id may have, whatever a maker wrote."""
    found = scheme(settings)
    assert found.short == short and ID_PATTERN.fullmatch(found.short)
    if words is None:
        assert (found.layout, found.weights, found.activations) == (None, None, None)
    else:
        assert words == (found.layout, found.weights, found.activations) and words[1:] in CARRIES[words[0]]


def test_the_caches_scheme(folder: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {},
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}  # fmt: skip
    config_of(folder, quantization_config=settings)
    assert read(str(folder), tmp_path).kv_cache == "8-bit float, tensor, static"
    config_of(folder, quantization_config=None)
    hf = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(hf), encoding="utf-8")
    found = read(str(folder), tmp_path)
    assert (found.kv_cache, found.method, found.short) == ("FP8", "modelopt", "modelopt-fp8")


# -------------------------------------------------------------------------------------------------------------- mistakes


def mistakes(spec: str, relative_to: Path) -> list[str]:
    with pytest.raises(Mistaken) as caught:
        read(spec, relative_to)
    assert str(caught.value) == "\n".join(caught.value.mistakes) and all(text.isprintable() for text in caught.value.mistakes)
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./nowhere", "./nowhere: need a folder with a checkpoint or a .gguf file, have none of this name"),
        ("nowhere.gguf", "have none of this name"), ("~nobody-here/x", "have none of this name"),
        ("/a\0b", "have none of this name"),
        ("", "need an existing folder, a .gguf file or ORG/NAME[@REVISION], have neither"),
        ("name", "have neither"),
        ("a/b/c", "have neither"), ("org/name@../x", "have neither"), ("-org/name", "have neither"),
        ("x" * 5000, "have neither"),
        ("other.txt", "other.txt: need a folder or a .gguf file, have another file"),
    ],
)  # fmt: skip
def test_what_is_not_here(tmp_path: Path, spec: str, words: str) -> None:
    (tmp_path / "other.txt").write_text("", encoding="utf-8")
    (found,) = mistakes(spec, tmp_path)
    assert words in found


def test_a_repository_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: str, *, allow_download: bool) -> Any:
        raise Unavailable(f"{source}: need it in the local hub cache, have none; {allow_download}")

    monkeypatch.setattr("quantdet.checkpoints.hub.snapshot", none)
    assert mistakes("org/name@v1", tmp_path) == ["org/name@v1: need it in the local hub cache, have none; False"]


def test_a_repository_in_the_cache_and_a_folder_of_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is here wins over the hub."""
    monkeypatch.setattr("quantdet.checkpoints.hub.snapshot", lambda *_, **__: (folder, f"org/Name@{'a' * 40}"))
    found = read("org/Name", tmp_path)
    assert (found.source, found.id, found.path) == (f"hub org/Name@{'a' * 40}", "name", folder)
    shutil.copytree(folder, tmp_path / "org" / "Name")
    assert read("org/Name", tmp_path).source == "folder Name"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]", encoding="utf-8")


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ', encoding="utf-8")


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' * 60 + "1" + "}" * 60, encoding="utf-8")


def odd_figures(folder: Path) -> None:
    config_of(folder, vocab_size="many", max_position_embeddings=-1)


def odd_settings(folder: Path) -> None:
    config_of(folder, quantization_config=None)
    (folder / "quantize_config.json").write_text("{", encoding="utf-8")


def shards_gone(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {str(at): f"{at}.safetensors" for at in range(5)}}), encoding="utf-8"
    )


def odd_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}', encoding="utf-8")


def ggufs_inside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.gguf")


def all_at_once(folder: Path) -> None:
    no_config(folder)
    pickled(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (no_config, ["need config.json, have none"]), (pickled, ["need *.safetensors, have pickles, which run code"]),
        (adapter, ["need a whole model, have a LoRA adapter alone (adapter_config.json): merge it into its base"]),
        (list_config, ["need an object in config.json, have list"]),
        (cut_config, ["need JSON in config.json, have JSONDecodeError"]),
        (deep_config, ["config.json: a.a.a nested deeper than 32"]),
        (odd_figures, ["config.json: vocab_size: need a positive integer, have 'many'",
                       "config.json: max_position_embeddings: need a positive integer, have -1"]),
        (odd_settings, ["need quantization settings in JSON, have JSONDecodeError"]),
        (shards_gone, ["need the 5 files that model.safetensors.index.json names, have 0: lacks 0.safetensors, 1.safetensors, "
                       "2.safetensors and 2 more"]),
        (odd_index, ["need a weight_map in model.safetensors.index.json, have AttributeError"]),
        (ggufs_inside, ["need *.safetensors, have .gguf files: name one of them"]),
        (all_at_once, ["need config.json, have none", "need *.safetensors, have pickles, which run code"]),
    ],
)  # fmt: skip
def test_every_mistake_at_once(folder: Path, tmp_path: Path, edit: Callable[[Path], None], words: list[str]) -> None:
    edit(folder)
    found = mistakes(str(folder), tmp_path)
    assert len(found) == len(words)
    assert all(text.startswith(f"folder My Model-GPTQ: {word}") for text, word in zip(found, words, strict=True)), found


def test_shards_are_counted_once(cache: Path, tmp_path: Path) -> None:
    """The files that the index names, and no others, have the size."""
    sharded(made(cache, "gptq", "int4-sym").path, tmp_path / "copy")
    size = sum(path.stat().st_size for path in (tmp_path / "copy").glob("*.safetensors"))
    shutil.copyfile(tmp_path / "copy" / "a.safetensors", tmp_path / "copy" / "surplus.safetensors")
    assert read("copy", tmp_path).size_bytes == size


# -------------------------------------------------------------------------------------------------- one file, and resolving


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(2048)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    weight = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", weight, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "Tiny-Q8_0.gguf")
    found = read("Tiny-Q8_0.gguf", tmp_path)
    assert (found.source, found.id, found.method, found.short) == ("file Tiny-Q8_0.gguf", "tiny-q8_0", "gguf", "gguf-q8-0")
    assert (found.vocab_size, found.max_positions, found.tokenizer, found.experts) == (3, 2048, True, False)
    assert found.settings == {"quant_method": "gguf", "file_type": "Q8_0", "types": ["F32", "Q8_0"]}
    assert (found.architecture, found.layout, found.dtype, found.size_bytes) == ("llama", None, None, path.stat().st_size)


def test_a_gguf_file_as_a_checkpoint(tmp_path: Path) -> None:
    """Hashed as a file, known by its bytes, noticed when it changes, and no control is made of it."""
    path = write_gguf(tmp_path / "x.gguf")
    one = resolve_own("x.gguf", tmp_path, cache=tmp_path / "cache")
    assert one.path == path and len(one.sha256) == 64 and one.numbers.startswith("bytes:")
    assert changed(path, one.sha256, files_sha256(path)) is None
    for control in (altered.renamed, altered.one_integer):
        with pytest.raises(Unavailable, match=r"need a checkpoint folder, have the file x\.gguf"):
            control(path, tmp_path / "cache")
    payload = path.read_bytes()
    path.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert changed(path, one.sha256, files_sha256(path)) == "tensors"
    assert resolve_own("x.gguf", tmp_path, cache=tmp_path / "cache").numbers != one.numbers


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "the header is cut off"), (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF\x09\0\0\0" + bytes(40), "GGUF version 9, need 2 or 3"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "entries, at most"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8, "a text of"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\x01" + bytes(7) + b"k" + b"\x09\0\0\0\x08\0\0\0" + b"\xff" * 8,
         "an array of"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\x01" + bytes(7) + b"k" + b"\x09\0\0\0\0\0\0\0" + b"\xff\xff" +
         bytes(6), "the header is cut off"),
    ],
)  # fmt: skip
def test_a_header_that_is_none(tmp_path: Path, payload: bytes, words: str) -> None:
    (tmp_path / "x.gguf").write_bytes(payload)
    (found,) = mistakes("x.gguf", tmp_path)
    assert found.startswith("file x.gguf: need a GGUF file, have ValueError: ") and words in found


def test_a_folder_is_hashed_and_its_numbers_told(folder: Path, tmp_path: Path) -> None:
    own = read(str(folder), tmp_path)
    one = resolve_described(own, cache=tmp_path / "cache")
    sha256 = tensors_sha256(folder)
    assert (one.path, one.sha256, one.source) == (folder, sha256, "folder My Model-GPTQ")
    assert one.numbers == numbers.of(folder, sha256) and one == resolve_own(str(folder), tmp_path, cache=tmp_path / "cache")
