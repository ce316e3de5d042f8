"""Whether a checkpoint is still what was hashed before an engine read it."""

from pathlib import Path

from quantdet.checkpoints.cache import digest
from quantdet.session.plans import files_sha256


def changed(folder: Path, tensors: str, files: str) -> str | None:
    """What of a checkpoint folder changed since its tensors and its other files had these digests; None: nothing.

    Tensors are read again only where size, time of change or inode of their files are others.
    """
    try:
        if digest(folder) != tensors:
            return "tensors"
        return None if files_sha256(folder) == files else "configuration or tokenizer"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
