"""Which numbers a checkpoint holds, whatever its layout: one digest over decoded integers, zero points, scales and activations.

Two checkpoints with the same digest give every kernel the same operands, also where one is GPTQ and the other AWQ or
compressed-tensors. Of each quantized projection are hashed, in the order of their names: the integers, as W [N, K] packed along
K with the first in the lowest bits; zero points uint8 [N, groups], or that there are none (symmetric); scales as float32,
exact for every narrower dtype; which group an input belongs to, where that is not its place (act-order); and how activations
are quantized, with their static scales. Every other tensor is hashed by name, shape and values as float32.

What is not decoded here (bitsandbytes, torchao, GGUF) has a digest over its stored bytes and its
quantization settings: the same for copies of one checkpoint, another for everything else.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints.decoding import Decoder, NotDecoded, Part, decoder
from quantdet.checkpoints.pool import in_order
from quantdet.checkpoints.tensors import Array, load_folder, word
from quantdet.untrusted import parse_json, read_bounded

# Part of every digest: raise it when what is hashed changes.
VERSION = 1

# Part of the names in the cache: raise it when more or less is decoded; what was known by its bytes is then asked again.
_DECODES = 2

_MAX_CONFIG_BYTES = 16 << 20
_TEXT = re.compile(r"(?:decoded|bytes):[0-9a-f]{64}")
# Where a checkpoint says how it is quantized, first found: transformers' file (of a model with vision inside of its text
# part; compressed-tensors had a name of its own), AutoGPTQ's, AutoAWQ's and ModelOpt's.
_SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.json", ("quantization_config",)), ("config.json", ("compression_config",)),
    ("config.json", ("text_config", "quantization_config")), ("quantize_config.json", ()), ("quant_config.json", ()),
    ("quant_config.json", ("quant_config",)), ("hf_quant_config.json", ("quantization",)),
)  # fmt: skip


def settings(folder: Path) -> dict[str, Any]:
    """How a checkpoint says that it is quantized; empty: it is not.

    Raises:
        OSError, ValueError: a file that cannot be read, or is no JSON object.
    """
    return settings_in(folder)[1]


def settings_in(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of the file that has a checkpoint's quantization settings ("": none has), and these, as `settings`."""
    for name, keys in _SETTINGS:
        if not (folder / name).is_file():
            continue
        found = parse_json(read_bounded(folder / name, _MAX_CONFIG_BYTES))
        if not isinstance(found, dict):
            raise ValueError(f"{folder / name}: not an object")
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and found:
            return name, found
    return "", {}


def of(folder: Path, tensors_sha256: str, cache: Path | None = None) -> str:
    """`decoded:SHA-256` of a checkpoint folder's numbers, or `bytes:SHA-256` where its layout is not decoded here.

    A checkpoint whose tensors contradict its settings is not decoded: it is like no other.

    Args:
        folder: a checkpoint; a `.gguf` file too, which is known by its bytes.
        tensors_sha256: `tensors.tensors_sha256` of it.
        cache: a folder that remembers digests, by the hashes of what they were made from.

    Raises:
        OSError, ValueError: the checkpoint cannot be read.
    """
    asked = {} if folder.is_file() else settings(folder)
    canonical = json.dumps(asked, sort_keys=True)
    key = hashlib.sha256(f"{VERSION}\0{tensors_sha256}\0{canonical}".encode()).hexdigest()
    known = None if cache is None else cache / ".numbers" / f"{key[:32]}-{_DECODES}.txt"
    if known is not None and (text := _remembered(known)):
        return text
    try:
        if folder.is_file():
            raise NotDecoded("GGUF")
        text = f"decoded:{_digest(load_folder(folder), decoder(asked))}"
    except NotDecoded:
        text = f"bytes:{key}"
    if known is not None:
        write_whole(known, text)
    return text


def _remembered(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        return text if _TEXT.fullmatch(text) else ""
    return ""


def write_whole(path: Path, text: str) -> None:
    """Write a text of ASCII, whole under its name or not at all; a cache that cannot be written costs time, and no cell."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)


def online(plain: str, how: Mapping[str, Any]) -> str:
    """The numbers that an engine makes of plain weights (`of` them) while it loads them: its arguments say how."""
    text = f"{plain}\0{json.dumps(dict(how), sort_keys=True)}"
    return f"online:{hashlib.sha256(text.encode()).hexdigest()}"


def _digest(tensors: Mapping[str, Array], decode: Decoder) -> str:
    digest = hashlib.sha256(f"numbers {VERSION}\0{decode.whole}".encode())
    modules, rest = decode.split(tensors)
    jobs = [partial(_module, decode, name, parts) for name, parts in sorted(modules.items())]
    jobs += [partial(plain_digest, array, name) for name, array in sorted(rest.items())]
    with closing(in_order(iter(jobs))) as results:
        for made in results:
            digest.update(made)
    return digest.hexdigest()


def _module(decode: Decoder, name: str, parts: dict[str, Array]) -> bytes:
    digest = hashlib.sha256(name.encode())
    for part in decode.module(name, parts):
        _update(digest, part)
    return digest.digest()


def plain_digest(array: Array, name: str = "") -> bytes:
    """SHA-256 of a tensor that is not quantized, and of its name: the same in every dtype that holds its values."""
    digest = hashlib.sha256(name.encode())
    floating = array.dtype.kind == "f" or word(array.dtype) in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
    for rows in _pieces(array):
        # float64 and integers as they are: nothing narrower means the same.
        _update(digest, ("values", rows.astype("<f4") if floating and array.dtype.itemsize < 8 else rows))
    digest.update(str(list(array.shape)).encode())
    return digest.digest()


def _pieces(array: Array) -> Iterator[Array]:
    """`array`, some of it at a time, so that no copy is large."""
    flat = array.reshape(-1)
    for start in range(0, max(len(flat), 1), 1 << 22):
        yield flat[start : start + (1 << 22)]


def _update(digest: Any, part: Part) -> None:
    name, value = part
    if isinstance(value, str):
        digest.update(f"\0{name}\0{value}".encode())
        return
    digest.update(f"\0{name}\0{value.dtype.kind}{value.dtype.itemsize}{list(value.shape)}\0".encode())
    if value.size:
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
