"""The header of a `.gguf` file, read with bounds: what it says of its model, and its tensors without their data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import unpack
from typing import Any, BinaryIO

_MOST_BYTES = 256 << 20  # of a header: a vocabulary of a million tokens with its merges is a tenth of it
_MOST_ENTRIES = 1 << 20
_MOST_TEXT = 1 << 20
_KEPT_TEXT = 4096
_ARRAY, _STRING = 9, 8
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class Header:
    """`values`: by key, scalars and texts, of arrays their length. `tensors`: by name, the type's word ("Q4_K") and shape."""

    values: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def read(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        OSError: it cannot be read.
        ValueError: not GGUF of version 2 or 3, cut off, or with figures that no header has.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        take = _Taker(file)
        if take.bytes(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        version = take.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, need 2 or 3")
        tensors, entries = take.count(), take.count()
        values = {}
        for _ in range(entries):
            key = take.text()
            if key in values:
                raise ValueError(f"{key[:80]!r} is given twice")
            values[key] = take.value(int(take.scalar("<I")))
        return Header(values, _tensors(take, tensors))


def file_type(header: Header) -> str:
    """llama.cpp's word for the mixture of types in a file ("Q4_K_M"); "": it has none."""
    from gguf import LlamaFileType  # imports much, and most checkpoints are no GGUF

    named = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
    kind = header.values.get("general.file_type")
    return named.get(kind, "") if isinstance(kind, int) else ""


def _tensors(take: "_Taker", count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    from gguf import GGMLQuantizationType

    words = {kind.value: kind.name for kind in GGMLQuantizationType}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for _ in range(count):
        name = take.text()
        if name in found:
            raise ValueError(f"tensor {name[:80]!r} is given twice")
        dimensions = int(take.scalar("<I"))
        if dimensions > 4:
            raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(int(take.scalar("<Q")) for _ in range(dimensions))
        kind = int(take.scalar("<I"))
        take.scalar("<Q")
        found[name] = words.get(kind, f"type {kind}"), shape
    return found


class _Taker:
    """Takes what a header is made of from a file, and no more of it than a header has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MOST_BYTES
        self._end = os.fstat(file.fileno()).st_size

    def bytes(self, count: int) -> bytes:
        self._account(count)
        found = self._file.read(count)
        if len(found) != count:
            raise ValueError("the header is cut off")
        return found

    def scalar(self, how: str) -> Any:
        return unpack(how, self.bytes({"?": 1, "B": 1, "b": 1, "H": 2, "h": 2, "Q": 8, "q": 8, "d": 8}.get(how[1], 4)))[0]

    def count(self) -> int:
        found = int(self.scalar("<Q"))
        if found > _MOST_ENTRIES:
            raise ValueError(f"{found} entries, at most {_MOST_ENTRIES}")
        return found

    def text(self) -> str:
        length = int(self.scalar("<Q"))
        if length > _MOST_TEXT:
            raise ValueError(f"a text of {length} bytes")
        return self.bytes(length).decode("utf-8", "replace")[:_KEPT_TEXT]

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        of, length = int(self.scalar("<I")), int(self.scalar("<Q"))
        if of in _BYTES:
            self._skip(length * _BYTES[of])
        elif of == _STRING and length <= _MOST_ENTRIES * 16:
            skip: Callable[[int], None] = self._skip
            for _ in range(length):
                skip(int(self.scalar("<Q")))
        else:
            raise ValueError(f"an array of {length} values of type {of}")
        return length

    def _skip(self, count: int) -> None:
        self._account(count)
        if self._file.tell() + count > self._end:
            raise ValueError("the header is cut off")
        self._file.seek(count, os.SEEK_CUR)

    def _account(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"a header of more than {_MOST_BYTES} bytes")
