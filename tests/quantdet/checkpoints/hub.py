"""Weights that exist as Hugging Face folders: on the hub (or its local cache) and at a path."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints.base import Base
from quantdet.checkpoints.cache import digest
from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.tensors import by_layer, load_folder
from quantdet.untrusted import parse_json, read_bounded

# No *.bin, no *.pt, no *.py: pickles run code when they are read, modules when a checkpoint is trusted.
_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model*", "tokenizer*.txt", "*.model", "merges.txt", "vocab.txt"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_CONFIG_BYTES = 16 << 20
_EXTRA = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")


def snapshot(source: str, *, allow_download: bool) -> tuple[Path, str]:
    """The folder of a hub repository, from the local hub cache unless `allow_download`, and `ORG/NAME@COMMIT` of what it holds.

    Args:
        source: `ORG/NAME`, whose main revision is taken, or `ORG/NAME@REVISION` (a commit, a tag or a branch, which are
            resolved to their commit by the cache).

    Raises:
        Unavailable: huggingface_hub is not installed, the repository is not here, or the download failed.
    """
    repository, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise Unavailable(
            f"{source}: need the package huggingface_hub, have none; pip install huggingface_hub, then --allow-download"
        ) from None
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision or None, local_files_only=not allow_download, allow_patterns=_PATTERNS
            )
        )
    except LocalEntryNotFoundError:
        if allow_download:
            raise Unavailable(f"{source}: need it in the local hub cache, have no connection to the hub") from None
        way = f"hf download {repository}{f' --revision {revision}' if revision else ''}, or --allow-download"
        raise Unavailable(f"{source}: need it in the local hub cache, have none; {way}") from None
    except (HfHubHTTPError, OSError) as error:
        raise Unavailable(f"{source}: need it from the hub, have {type(error).__name__}") from None
    if not list(folder.glob("*.safetensors")):
        raise Unavailable(f"{source}: need *.safetensors, have a snapshot without; --allow-download")
    commit = f"@{folder.name}" if _COMMIT.fullmatch(folder.name) else ""  # a cache names its snapshots by their commits
    return folder, repository + commit


@dataclass(frozen=True)
class FolderSource:
    """A local Hugging Face folder with unquantized safetensors."""

    folder: Path

    def config(self) -> dict[str, Any]:
        """`config.json`.

        Raises:
            Unavailable: no such folder, no or bad config.json, no safetensors, weights that are already quantized.
        """
        try:
            config = parse_json(read_bounded(self.folder / "config.json", _MAX_CONFIG_BYTES))
        except (OSError, ValueError) as error:
            raise Unavailable(f"{self.folder}: need a readable config.json, have {type(error).__name__}") from None
        if not isinstance(config, dict):
            raise Unavailable(f"{self.folder}: need an object in config.json, have {type(config).__name__}")
        if "quantization_config" in config:
            raise Unavailable(f"{self.folder}: need unquantized weights, have a quantization_config")
        if not list(self.folder.glob("*.safetensors")):
            raise Unavailable(f"{self.folder}: need *.safetensors, have none")
        return config

    def identity(self) -> dict[str, Any]:
        """Digest of the tensors and the configuration; not cheap, but a folder may change at any time."""
        return {"source": "folder", "config": self.config(), "sha256": digest(self.folder)}

    @contextmanager
    def open(self) -> Iterator[Base]:
        """The weights, memory-mapped."""
        extra = sorted({path for pattern in _EXTRA for path in self.folder.glob(pattern) if path.is_file()})
        loads = {name: partial(np.asarray, array) for name, array in load_folder(self.folder).items()}
        yield Base(self.config(), by_layer(loads), tuple(extra))
