"""An engine's temporary files: a folder of its own, which is gone when the engine is, whoever of the two was killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "quantdet-engine-"
_GRACE_S = 60.0  # between a folder's making and its lock


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, locked while the block runs and removed after it."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = -1
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks: then a killed run's folder stays
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        remove(path)
        if lock >= 0:
            os.close(lock)


def remove(path: Path, within_s: float = 2.0) -> None:
    """Remove a folder in which killed processes may still be writing."""
    end = time.monotonic() + within_s
    shutil.rmtree(path, ignore_errors=True)
    while path.exists() and time.monotonic() < end:
        time.sleep(0.02)
        shutil.rmtree(path, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of runs that were killed together with their engines: nobody holds their locks."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _GRACE_S:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
