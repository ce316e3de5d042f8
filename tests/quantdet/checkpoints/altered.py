"""Checkpoints for controls: the same weights under another name, and the same but for one stored integer."""

import os
import shutil
from pathlib import Path

from quantdet.checkpoints import cache as _cache
from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.tensors import files, read_header

# What a layout calls the tensor of a projection's integers; plain `weight` is one where its dtype is an integer's. Bytes
# without a sign hold the codes of narrow floats.
_PACKED = (".qweight", ".weight_packed")
_INTEGERS = ("I8", "I32")


def renamed(folder: Path, root: Path) -> tuple[Path, str]:
    """`folder` under another name below `root`, and its tensors' SHA-256 (the same).

    Args:
        folder: a checkpoint.
        root: a cache of checkpoints (`cache.ensure`).

    Raises:
        Unavailable: the checkpoint is one file.
    """
    _folder(folder, "renamed")
    return _cache.ensure(root, {"control": "renamed", "of": _cache.digest(folder)}, lambda target: _link(folder, target))


def one_integer(folder: Path, root: Path) -> tuple[Path, str, str]:
    """A copy in which one stored integer weight is another by 1; its tensors' SHA-256, and the tensor's name.

    The lowest bit of the first integer of the first projection that stores integers is turned over: of packed 4-bit
    weights the lowest four bits of a byte are one of them.

    Raises:
        Unavailable: no projection of `folder` stores integers, or the checkpoint is one file.
    """
    _folder(folder, "one integer")
    path, name, offset = _first_integer(folder)

    def build(target: Path) -> None:
        _link(folder, target, but=path.name)
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    built, sha256 = _cache.ensure(root, {"control": "one integer", "tensor": name, "of": _cache.digest(folder)}, build)
    return built, sha256, name


def _folder(folder: Path, control: str) -> None:
    if folder.is_file():
        raise Unavailable(f"{control}: need a checkpoint folder, have the file {folder.name}")


def _first_integer(folder: Path) -> tuple[Path, str, int]:
    for path in files(folder):
        for name, entry in sorted(read_header(path).items()):
            projection = "_proj." in name and (name.endswith(_PACKED) or name.endswith(".weight"))
            if projection and entry.dtype in _INTEGERS:
                return path, name, entry.start
    raise Unavailable(f"one integer: need a projection of stored integers, have none in {folder.name}")


def _link(folder: Path, target: Path, but: str = "") -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name not in (_cache.RECORD, but):
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target / path.name)
