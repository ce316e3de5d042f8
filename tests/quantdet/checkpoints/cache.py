"""A cache of built checkpoint folders that concurrent, killed and disturbed builders cannot spoil.

`ROOT/KEY/` is a whole checkpoint: it appears by one rename and carries `checkpoint.json`, written last, with the size of
every file and the SHA-256 of the tensors. `ROOT/.KEY.part/` is a build in progress or its remains; `ROOT/.KEY.lock` keeps
a second builder waiting.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantdet.checkpoints.tensors import tensors_sha256

RECORD = "checkpoint.json"


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
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return final, sha256


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
        sha256 = tensors_sha256(folder)
        return sha256 if record["sha256"] == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
