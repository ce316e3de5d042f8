"""safetensors files as numpy arrays: header checks, memory-mapped reading, sharded writing, one digest per checkpoint.

The format (https://github.com/huggingface/safetensors, "Format") is eight bytes of header length, a JSON header and the
raw little-endian tensors. It is written here rather than by the `safetensors` package so that the bytes do not depend
on that package's version, and so that bfloat16 and float8 need no torch.
"""

import hashlib
import json
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantdet.untrusted import parse_json, read_bounded

Array = npt.NDArray[Any]
Load = Callable[[], Array]  # makes or reads one tensor, in whatever thread calls it
T = TypeVar("T")

INDEX_NAME = "model.safetensors.index.json"
_SHARD_BYTES = 2**30
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors package has it
_MAX_INDEX_BYTES = 64 << 20

# safetensors' dtype words.
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


def word(dtype: np.dtype[Any]) -> str:
    """safetensors' word for a dtype ("BF16"). Raises KeyError if it has none."""
    return _WORDS[dtype.newbyteorder("<")]


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype word, shape, first and last-plus-one byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, with every offset checked against the file's size.

    Raises:
        ValueError: truncated file, header that is no JSON object, unknown dtype, shape and offsets that do not agree,
            overlapping or missing bytes.
    """

    def bad(what: str) -> ValueError:
        return ValueError(f"{path}: not a valid safetensors file: {what}")

    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would block
        raise bad("not a regular file")
    size = status.st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise bad(f"header of {length} bytes in a file of {size} bytes")
        if length > _MAX_HEADER_BYTES:
            raise bad(f"header of {length} bytes, at most {_MAX_HEADER_BYTES}")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise bad(f"header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise bad("header is not an object")
    entries: dict[str, Entry] = {}
    for name, row in header.items():
        if name == "__metadata__":
            continue
        try:
            word, shape, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
            numbers = [*shape, first, last]
        except (TypeError, KeyError, ValueError):
            raise bad(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
        if not isinstance(word, str) or word not in _DTYPES:
            raise bad(f"tensor {name!r} has unknown dtype {word!r}")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise bad(f"tensor {name!r} has a shape or offset that is no natural number")
        if last - first != math.prod(shape) * _DTYPES[word].itemsize or 8 + length + last > size:
            raise bad(f"tensor {name!r}: {word} {list(shape)} does not fit bytes {first} to {last} of {size - 8 - length}")
        entries[name] = Entry(word, shape, 8 + length + first, 8 + length + last)
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != end:
            raise bad(f"tensors overlap or leave a gap at byte {min(entry.start, end)}")
        end = entry.end
    if end != size:
        raise bad(f"{size - end} bytes behind the last tensor")
    return entries


def load(path: Path) -> dict[str, Array]:
    """The tensors of a file as read-only views of a memory map (nothing is read before it is used).

    Raises:
        ValueError: see `read_header`.
    """
    entries = read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return {name: data[e.start : e.end].view(_DTYPES[e.dtype]).reshape(e.shape) for name, e in entries.items()}


def files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those its index names, else all of them.

    Raises:
        ValueError: no safetensors file, an unreadable index, or an index that names a missing or foreign file.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        found = sorted(directory.glob("*.safetensors"))
        if not found:
            raise ValueError(f"{directory}: no *.safetensors file")
        return found
    try:
        names = sorted(set(parse_json(read_bounded(index, _MAX_INDEX_BYTES))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error})") from None
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{index}: not a safetensors index (a file's name is no text)")
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is no file of this folder")
    return [directory / name for name in names]


def load_folder(directory: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint folder, memory-mapped.

    Raises:
        ValueError: see `files` and `read_header`; two files with the same tensor.
    """
    tensors: dict[str, Array] = {}
    for path in files(directory):
        for name, array in load(path).items():
            if name in tensors:
                raise ValueError(f"{path}: tensor {name!r} is in another file of this folder too")
            tensors[name] = array
    return tensors


def tensors_sha256(directory: Path) -> str:
    """SHA-256 over the tensors of a folder: name, dtype, shape and bytes of each, in the order of their names.

    Sharding, metadata and the order inside the files do not change it.

    Raises:
        ValueError: see `load_folder`.
    """
    digest = hashlib.sha256()
    for name, array in sorted(load_folder(directory).items()):
        digest.update(f"{name}\0{_WORDS[array.dtype]}\0{list(array.shape)}\0".encode())
        if array.size:
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save(tensors: Mapping[str, Array], path: Path) -> None:
    """Write one safetensors file. Widest dtype first, then by name, so that every tensor is aligned.

    Raises:
        ValueError: a dtype that safetensors has no word for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    position = 0
    for name, array in ordered:
        if array.dtype.newbyteorder("<") not in _WORDS:
            raise ValueError(f"tensor {name!r}: safetensors has no word for dtype {array.dtype}")
        header[name] = {
            "dtype": _WORDS[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)


class ShardWriter:
    """Writes a stream of tensors into a folder, a new file whenever about 1 GiB has come together."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Array] = {}
        self._parts: list[tuple[Path, list[str]]] = []
        self._bytes = 0
        self._total = 0

    def add(self, tensors: Mapping[str, Array]) -> None:
        """Take tensors; they are on disk at the latest after `close`."""
        self._pending.update(tensors)
        size = sum(array.nbytes for array in tensors.values())
        self._bytes += size
        self._total += size
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, name the files as Hugging Face does, and write their index if there are several."""
        if self._pending:
            self._flush()
        if len(self._parts) == 1:
            self._parts[0][0].rename(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._parts, 1):
            final = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
            path.rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        path = self._directory / f"part-{len(self._parts)}.safetensors"
        save(self._pending, path)
        self._parts.append((path, list(self._pending)))
        self._pending, self._bytes = {}, 0


def by_layer(tensors: Mapping[str, T]) -> Iterator[dict[str, T]]:
    """`tensors` in batches: one for each decoder layer in order, the rest last."""
    groups: dict[int, dict[str, T]] = {}
    rest: dict[str, T] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isdecimal():
            groups.setdefault(int(parts[2]), {})[name] = tensor
        else:
            rest[name] = tensor
    for number in sorted(groups):
        yield groups[number]
    if rest:
        yield rest
