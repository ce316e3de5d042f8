"""Safetensors files and their digests; bad ones are refused."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.checkpoints import resolve, tensors
from selftest.fakes.checkpoints import W4, make_model


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_safetensors_round_trip(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, int]]) -> None:
    kinds = [np.float32, ml_dtypes.bfloat16, np.int64, ml_dtypes.float8_e4m3fn, np.uint8, np.float16]
    made = {
        name: np.arange(a * b).astype(kinds[i % len(kinds)]).reshape(a, b) for i, (name, (a, b)) in enumerate(shapes.items())
    }
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors.save(made, path)
    found = tensors.load(path)
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_digest_does_not_see_shards_or_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = resolve("m", make_model(), W4, cache=tmp_path / "one")
    monkeypatch.setattr(tensors, "_SHARD_BYTES", 100_000)
    many = resolve("m", make_model(), W4, cache=tmp_path / "two")
    assert len(tensors.files(many.path)) > 2 and len(tensors.files(one.path)) == 1
    assert many.sha256 == one.sha256
    index = json.loads((many.path / tensors.INDEX_NAME).read_text())
    assert index["weight_map"].keys() == tensors.load_folder(many.path).keys()


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header of 0 bytes"),
        (b"\xff" * 8, "header of 18446744073709551615 bytes"),
        (raw(b"{"), "not JSON"),
        (raw(b"\xff\xfe"), "not JSON"),
        (raw([]), "not an object"),
        (raw({"t": 3}), "lacks dtype"),
        (raw({"t": {**F32, "dtype": "F4"}}, b"1234"), "unknown dtype 'F4'"),
        (raw({"t": {**F32, "dtype": []}}, b"1234"), "unknown dtype"),
        (raw({"t": {**F32, "shape": [-1]}}, b"1234"), "no natural number"),
        (raw({"t": {**F32, "shape": [2]}}, b"1234"), "does not fit"),
        (raw({"t": F32}, b"12"), "does not fit"),
        (raw({"t": F32}, b"123456"), "2 bytes behind"),
        (raw({"t": F32, "u": F32}, b"1234"), "overlap"),
    ],
    ids=[
        "empty", "huge-header", "cut-json", "no-utf8", "list", "no-object", "unknown-dtype", "list-dtype", "negative",
        "wrong-shape", "truncated", "trailing", "overlap",
    ],
)  # fmt: skip
def test_bad_safetensors_file(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a valid safetensors file: .*" + words):
        tensors.load(path)


def test_index_that_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / tensors.INDEX_NAME).write_text(json.dumps({"weight_map": {"t": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        tensors.load_folder(tmp_path)
