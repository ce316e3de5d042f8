"""A cache of built checkpoint folders that concurrent, killed and disturbed builders cannot spoil.

`ROOT/KEY/` is a whole checkpoint: it appears by one rename and carries `checkpoint.json`, written last, with the size of
every file and the SHA-256 of the tensors. `ROOT/.KEY.part/` is a build in progress or its remains; `ROOT/.KEY.lock` keeps
a second builder waiting.

An entry is hashed before it is used. Within one process it is not hashed again while the name, size, modification time and
inode of its tensor files stay as they were when it was found or made whole.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantdet.checkpoints.tensors import tensors_sha256

RECORD = "checkpoint.json"

# By folder: its tensor files' identity and their SHA-256, as this process found them.
_verified: dict[Path, tuple[Any, str]] = {}

# Modification times have the grain of the system's clock tick (10 ms at most); a younger file could change and show the same.
_SETTLED_NS = 100_000_000


def key(description: dict[str, Any]) -> str:
    """The folder name for a description (JSON values): 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def ensure(root: Path, description: dict[str, Any], build: Callable[[Path], None]) -> tuple[Path, str]:
    """The checkpoint folder of `description` and its tensors' SHA-256; `build(folder)` fills it if it is not here.

    An entry that is incomplete or does not match its record any more is built again.

    Raises:
        Whatever `build` raises; nothing stays in the cache then.
    """
    root.mkdir(parents=True, exist_ok=True)
    name = key(description)
    final, part = root / name, root / f".{name}.part"
    with FileLock(root / f".{name}.lock"):
        sha256 = _whole(final)
        if sha256 is not None:
            return final, sha256
        for remains in (final, part):
            if remains.exists():
                shutil.rmtree(remains)
        part.mkdir()
        try:
            build(part)
            sha256 = tensors_sha256(part)
            record = {"sha256": sha256, "files": _files(part), "description": description}
            (part / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(part, final)
            _remember(final, sha256, time.time_ns())
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return final, sha256


def verified(root: Path, description: dict[str, Any]) -> Path | None:
    """The checkpoint folder of `description` if this process has found it whole and it has not changed; reads no tensor."""
    folder = root / key(description)
    return folder if _remembered(folder) is not None else None


def digest(folder: Path) -> str:
    """`tensors_sha256` of any checkpoint folder, of a file its SHA-256; read once in a process while its files do not change.

    Raises:
        ValueError: see `tensors_sha256`.
    """
    sha256 = _remembered(folder)
    if sha256 is None:
        began = time.time_ns()
        sha256 = _file_sha256(folder) if folder.is_file() else tensors_sha256(folder)
        _remember(folder, sha256, began)
    return sha256


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(folder: Path) -> list[tuple[str, int, int, int]]:
    found = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors*"))  # and their index
    stats = [(path.name, path.stat()) for path in found]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]


def _remember(folder: Path, sha256: str, seen_ns: int) -> None:
    """Note what the tensors were at `seen_ns` and later."""
    identity = _identity(folder)
    if all(mtime_ns + _SETTLED_NS < seen_ns for _, _, mtime_ns, _ in identity):
        _verified[folder.resolve()] = identity, sha256


def _remembered(folder: Path) -> str | None:
    known = _verified.get(folder.resolve())
    return known[1] if known is not None and known[0] == _identity(folder) else None


def _files(folder: Path) -> dict[str, Any]:
    """Size of every file; of the small ones (all but the tensors, which have a digest of their own) the SHA-256 too."""
    return {
        path.name: [path.stat().st_size]
        if path.suffix == ".safetensors"
        else [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(folder.iterdir())
        if path.name != RECORD
    }


def _whole(folder: Path) -> str | None:
    """The SHA-256 of the tensors if `folder` is exactly what its record says, else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["files"] != _files(folder):
            return None
        sha256 = digest(folder)
        return sha256 if record["sha256"] == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
