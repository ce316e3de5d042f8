"""Arrays of many observations in one compressed file: `HARDWARE/MODEL.safetensors.xz` of a recording.

The file is one .xz stream (LZMA2) of a safetensors file, in which every tensor is the `tensors.safetensors` of an observation,
uint8 (bytes,), named by its SHA-256: the `tensors_sha256` of the header, which stays in its folder. Formats that give the same
bits, and versions of vLLM that do, hold the same digests and logprobs, which is what makes the file small; a digest by itself
cannot be compressed. Nothing in it is a path.

A packed file may come from somebody else. Its own index says beforehand how much it unpacks to, which is bounded, and so are
the bytes that are taken from it, whatever the index says, and the memory of the dictionary.
"""

import functools
import lzma
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from quantdet.observations.blocks import ObservationError
from quantdet.observations.header import Header
from quantdet.untrusted import read_bounded

SUFFIX = ".safetensors.xz"
MAX_PACKED_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 256 << 20
_DICTIONARY = 64 << 20  # how far back equal bytes are found: all arrays of a model
_DICTIONARY_LIMIT = 96 << 20  # the dictionary and what liblzma needs beside it
# Most arrays are made of words of four bytes, whose positions and predecessors tell more than single bytes do.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": _DICTIONARY, "lc": 0, "lp": 2, "pb": 2}]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC, _END = b"\xfd7zXZ\x00", b"YZ"
_FOOTER = 12  # bytes: checksum, size of the index, flags, end

Payloads = Mapping[str, NDArray[np.uint8]]


def path_of(directory: Path, header: Header) -> Path | None:
    """Where the packed arrays of an observation lie; None in a folder that is not of a recording's shape."""
    cell = header.cell
    shape = (cell.hardware_id, cell.model_id, cell.format_id)
    if len(directory.parts) < 5 or tuple(directory.parts[place] for place in (-5, -3, -2)) != shape:
        return None
    return directory.parents[3] / f"{cell.model_id}{SUFFIX}"


def bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ObservationError: it cannot be read, is larger, or no regular file.
    """
    try:
        return read_bounded(path, most)
    except OSError as error:
        raise ObservationError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ObservationError(f"{path}: {error}") from None


def payload(path: Path, sha256: str) -> bytes:
    """The `tensors.safetensors` of this SHA-256 in the packed file `path`; the caller compares the hash.

    Raises:
        ObservationError: the file cannot be used, or does not hold it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ObservationError(f"{path}: {error.strerror}") from None
    found = _load(path, (status.st_ino, status.st_size, status.st_mtime_ns)).get(sha256)
    if found is None:
        raise ObservationError(f"{path}: has no arrays of tensors_sha256 {sha256[:16]}")
    return found.tobytes()


@functools.lru_cache(maxsize=1)  # observations are read model by model, and each of them needs the same file
def _load(path: Path, state: tuple[int, ...]) -> Payloads:
    """Arrays by SHA-256; `state` changes where the file does."""
    return read(path)


def read(path: Path) -> Payloads:
    """All arrays of a packed file, by their SHA-256.

    Raises:
        ObservationError: damaged, larger than allowed, or of another form.
    """
    content = bounded(path, MAX_PACKED_BYTES)
    try:
        found = load_tensors(_unpack(content))
    except ValueError as error:
        raise ObservationError(f"{path}: {error}") from None
    except Exception as error:  # safetensors raises types of its own
        raise ObservationError(f"{path}: not packed arrays: {error}") from None
    for name, array in found.items():
        if not _SHA256.fullmatch(name):
            raise ObservationError(f"{path}: {ascii(name)[:80]}: a name that is no SHA-256")
        if array.dtype != np.uint8 or array.ndim != 1:
            raise ObservationError(f"{path}: {name[:16]}: {array.dtype} {array.shape}, needs uint8 (bytes,)")
    return found


def content(payloads: Mapping[str, bytes]) -> bytes:
    """What is compressed: the same bytes for the same arrays, in whatever order they come."""
    return save_tensors({name: np.frombuffer(payloads[name], np.uint8) for name in sorted(payloads)})


def compress(unpacked: bytes) -> bytes:
    """The packed file. One liblzma gives the same bytes for the same content; any one reads what another wrote."""
    return lzma.compress(unpacked, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS)


def put(path: Path, blob: bytes) -> None:
    """Write a file whole under its name, or not at all."""
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.write_bytes(blob)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unpack(packed: bytes) -> bytes:
    """The content of one .xz stream.

    Raises:
        ValueError: damaged, or more than one stream, or one that is not what its index says; too large.
    """
    size = _promised(packed)
    if size > MAX_UNPACKED_BYTES:
        raise ValueError(f"unpacks to {size} bytes, at most {MAX_UNPACKED_BYTES}")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DICTIONARY_LIMIT)
    try:
        # One byte more than was promised: a stream that has it is not believed, and nothing else of it is taken.
        found = decompressor.decompress(packed, max_length=size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"not a whole .xz stream: {error}") from None
    if len(found) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"not a whole .xz stream: its index says {size} bytes")
    return found


def _promised(packed: bytes) -> int:
    """Unpacked bytes, from the index at the end of a stream (The .xz File Format 1.2, sections 2.1.2 and 4).

    Raises:
        ValueError: there is no such index.
    """
    footer = packed[-_FOOTER:]
    if not packed.startswith(_MAGIC) or len(footer) < _FOOTER or not footer.endswith(_END):
        raise ValueError("not a whole .xz stream")
    length = 4 * (int.from_bytes(footer[4:8], "little") + 1)
    # An empty byte, the number of blocks, of each its packed and its unpacked size; padding and a checksum behind them.
    index = packed[-_FOOTER - length : -_FOOTER]
    numbers, value, shift = [], 0, 0
    for byte in index[1:-4]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise ValueError("not a whole .xz stream: a size of more than 63 bits")
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    if len(index) != length or not numbers or len(numbers) < 1 + 2 * numbers[0]:
        raise ValueError("not a whole .xz stream: no index")
    return sum(numbers[2 : 1 + 2 * numbers[0] : 2])
