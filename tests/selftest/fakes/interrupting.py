"""Ctrl-C at every line: measures with the fake engine while SIGINT comes at one line after another; prints what stayed.

python -m selftest.fakes.interrupting STRIDE     (a process of its own: its handlers and its temporary files are watched)
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from quantdet.engines.plan import Plan, PlannedPrompt
from quantdet.engines.process import interrupts, process, scratch
from quantdet.engines.process.interrupts import held
from quantdet.matrix.cell import Cell
from quantdet.observations import store
from selftest.fakes.engine import FAKE, alive, left_behind
from selftest.fakes.observation import IDENTITY

CELL, ENVIRONMENT, KEY = Cell("alpha", "bf16", "cpu-here"), "here", "0" * 64
# Where a signal must not leave anything behind; a context manager's own machinery is Python's.
WATCHED = {module.__file__ for module in (interrupts, process, scratch, store)}


def measure(root: Path, pids: Path) -> None:
    """What a session does for one engine lifetime."""
    plan = Plan(
        identity=IDENTITY, checkpoint="none", dtype="float32", args={"pids": str(pids), "behaviour": "children"}, env={},
        prompts=(PlannedPrompt("p0", tuple(range(10, 16)), tuple(range(20, 24)), 2),), repeats=2, decode_tokens=4, top_k=4,
    )  # fmt: skip
    with held(), store.Store(root).writing(CELL, ENVIRONMENT, KEY) as folder:
        process.run(FAKE, Plan(**{**vars(plan), "identity": {**IDENTITY, "repeats": 2}}), folder, pids.with_name("log"), 60)


def lines(call: Callable[[], None], at: int) -> int:
    """How many lines of the watched modules `call` ran; SIGINT comes at number `at`."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGINT)
        return line

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename in WATCHED else None

    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def stayed(root: Path, pids: Path) -> list[str]:
    """What a run left that it must not leave."""
    noted = [int(pid) for pid in pids.read_text(encoding="utf-8").split()] if pids.exists() else []
    found = [f"process {pid}" for pid in alive(noted)] + [f"{path}" for path in left_behind(Path(tempfile.gettempdir()))]
    found += [f"{path}" for path in root.rglob(".*")] if root.exists() else []
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        found.append("a handler")
    if root.exists():
        store.Store(root).all()
    return found


@contextmanager
def temporary() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = str(Path(folder, "t"))
        os.mkdir(tempfile.tempdir)
        yield Path(folder)
        tempfile.tempdir = None


def main(stride: int) -> None:
    """Prints the number of lines, how many runs were cut off, and by line what stayed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process._context(FAKE, Plan({}, "", "", {}, {}, (), 2, 2, 2))  # the forkserver's own files are not what is watched
    with temporary() as folder:
        total = lines(lambda: measure(folder / "s", folder / "pids"), 0)
    found: dict[int, list[str]] = {}
    cut = 0
    for at in range(1, total + 1, stride):
        with temporary() as folder:
            try:
                lines(lambda: measure(folder / "s", folder / "pids"), at)
            except KeyboardInterrupt:
                cut += 1
            with suppress(KeyboardInterrupt):
                if bad := stayed(folder / "s", folder / "pids"):
                    found[at] = bad
    print(json.dumps({"lines": total, "cut": cut, "stayed": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
