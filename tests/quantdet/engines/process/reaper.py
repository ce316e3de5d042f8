"""Ends what a killed run leaves: a process of its own, since an engine that hangs in C cannot watch over itself.

It reads from a pipe which engines run; at the pipe's end, which comes with the end of this process however that came, it
kills their process groups and removes their temporary files.
"""

import atexit
import contextlib
import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import contextlib, json, os, shutil, signal, sys
engines = {}
for line in sys.stdin:
    pid, folder = json.loads(line)
    engines[pid] = folder
    if not folder:
        del engines[pid]
for pid, folder in engines.items():
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
"""

_process: subprocess.Popen[str] | None = None


def watch(pid: int, folder: Path) -> None:
    """From now on the engine `pid`, its group and its temporary files end with this process."""
    global _process
    if _process is None or _process.poll() is not None:
        with contextlib.suppress(OSError):  # a second line of defence: without it a run is a run
            # -I -S: nothing of this process's environment, and quickly; a session of its own: Ctrl-C is not for it.
            command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
            _process = subprocess.Popen(
                command, cwd="/", text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            atexit.register(_close, _process)
    _tell(pid, str(folder))


def forget(pid: int) -> None:
    """The engine has ended, and so have the others of its group."""
    _tell(pid, "")


def _tell(pid: int, folder: str) -> None:
    if _process is not None and _process.stdin is not None:
        with contextlib.suppress(OSError, ValueError):
            _process.stdin.write(json.dumps([pid, folder]) + "\n")
            _process.stdin.flush()


def _close(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
