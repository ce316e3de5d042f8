"""Whether a checkpoint is still what was hashed before an engine read it."""

import hashlib
from pathlib import Path

from quantdet.checkpoints.cache import digest


def files_sha256(folder: Path) -> str:
    """SHA-256 over the small files of a checkpoint (configuration, tokenizer), which its tensors' hash leaves out.

    A checkpoint that is one file (.gguf) has none: all of it is in its own hash.
    """
    digest = hashlib.sha256()
    if folder.is_file():
        return digest.hexdigest()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "checkpoint.json":
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def changed(folder: Path, tensors: str, files: str) -> str | None:
    """What of a checkpoint (folder or `.gguf` file) changed since its tensors and its other files had these digests.

    None: nothing. Tensors are read again only where size, time of change or inode of their files are others.
    """
    try:
        if digest(folder) != tensors:
            return "tensors"
        return None if files_sha256(folder) == files else "configuration or tokenizer"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
