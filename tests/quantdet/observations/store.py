"""The store: a folder of observations, `HARDWARE/ENVIRONMENT/MODEL/FORMAT/KEY`. A recording has the same shape.

An observation becomes visible by one rename, so that a half-written one is never taken for whole; a rerun finds what
is finished by its key, which covers everything that the observation depends on.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantdet.matrix.cell import Cell
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, Observation, ObservationError, payload_of, read


def slug(environment: dict[str, Any]) -> str:
    """A folder name: the versions to read, and a hash over everything."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:8]
    versions = f"vllm-{environment.get('vllm') or 'none'}-torch-{environment.get('torch_package') or 'none'}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{versions}-{digest}")


def key_of(identity: dict[str, Any]) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


LOST = "lost"  # folder of what workers of a run tell each other (`quantdet.session.lost_engines`)
_ATTEMPTS = 5  # two runs that replace the same damaged one may be in each other's way
# A key's beginning and what tempfile appends.
_UNFINISHED = re.compile(r"\.(?:[0-9a-f]{16}|trace)\.[a-z0-9_]{8}")


class Store:
    """Observations below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.set_aside: list[Path] = []

    def place(self, cell: Cell, environment: str, key: str) -> Path:
        return self.root / cell.hardware_id / environment / cell.model_id / cell.format_id / key[:16]

    def find(self, cell: Cell, environment: str, key: str) -> Observation | None:
        """A whole observation with this key, else None; a damaged one is put aside, to be measured again."""
        place = self.place(cell, environment, key)
        if not (place / HEADER_FILE).is_file():
            return None
        try:
            observation = read(place)
        except ObservationError:
            self._set_aside(place)
            return None
        return observation if observation.header.key == key else None

    @contextlib.contextmanager
    def writing(self, cell: Cell, environment: str, key: str) -> Iterator[Path]:
        """An empty folder to write an observation into; it becomes the observation if a header stands in it."""
        place = self.place(cell, environment, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield temporary
            if (temporary / HEADER_FILE).is_file():
                for _ in range(_ATTEMPTS):
                    with contextlib.suppress(OSError):
                        os.rename(temporary, place)
                        return
                    # Another run finished the same one first, or one that is damaged, or of another key, is in the way.
                    if self.find(cell, environment, key) is not None:
                        return
                    shutil.rmtree(place, ignore_errors=True)
                os.rename(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def log(self, cell: Cell, lifetime: str) -> Path:
        """Where the engine's output of a lifetime goes: an empty file of this run; those of runs that are over are removed."""
        folder = self.root / "logs" / cell.hardware_id / cell.model_id
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{cell.format_id}.{lifetime}.*.log"):
            run = old.name.split(".")[-2]
            if not run.isdecimal() or int(run) == os.getpid() or not Path("/proc", run).exists():
                old.unlink(missing_ok=True)
        path = folder / f"{cell.format_id}.{lifetime}.{os.getpid()}.log"
        path.touch()
        return path

    def all(self) -> list[Observation]:
        """Every observation below the folder, sorted by path. Raises ObservationError at the first bad one."""
        if not self.root.is_dir():
            raise ObservationError(f"{self.root}: no such folder")
        folders = sorted(p.parent for p in self.root.rglob(HEADER_FILE) if not p.parent.name.startswith("."))
        # Model by model, since observations of one may share a packed file, which is then unpacked once.
        found = {folder: read(folder) for folder in sorted(folders, key=lambda folder: (folder.parts[-3:-2], folder))}
        return [found[folder] for folder in folders]

    def sweep(self) -> None:
        """Remove what a killed run left half-written, a day after; never a folder of another name."""
        for folder in self.root.glob(f"{LOST}/*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > 86_400:
                    shutil.rmtree(folder, ignore_errors=True)
        for folder in (*self.root.glob("*/*/*/*/.*"), *self.root.glob("diagnoses/*/*/*/*/.trace.*")):
            with contextlib.suppress(OSError):  # another worker was quicker
                if _UNFINISHED.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > 86_400:
                    shutil.rmtree(folder, ignore_errors=True)

    def forget(self, cell: Cell, environment: str, key: str) -> None:
        shutil.rmtree(self.place(cell, environment, key), ignore_errors=True)

    def _set_aside(self, place: Path) -> None:
        with contextlib.suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=f".damaged-{place.name}-", dir=place.parent))
            try:
                os.rename(place, aside)
                self.set_aside.append(aside)
            except OSError:
                aside.rmdir()


def copy_into(observation: Observation, root: Path) -> None:
    """Copy an observation into a recordings folder of the same shape; arrays that are packed become plain ones."""
    assert observation.path is not None
    relative = Path(*observation.path.parts[-5:])
    target = root / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".recording.", dir=target.parent))
    try:
        shutil.copytree(observation.path, temporary, dirs_exist_ok=True)
        if observation.prompts and not (temporary / TENSORS_FILE).exists():
            (temporary / TENSORS_FILE).write_bytes(payload_of(observation.path, observation.header))
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):
                os.rename(temporary, target)
                return
            shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
