"""What an engine is started for and how long it took, on pytest's own line, so that a slow start is not taken for a hang.

For people at a terminal: nothing in CI, in a pipe, under xdist workers or with -q.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from quantdet.matrix.cell import Cell

_PARTS = {"measure": "measuring", "verify": "re-executing", "control": "control", "diagnosis": "tracing layers"}

Announce = Callable[[Cell, int, str], AbstractContextManager[None]]


def announcer(config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> Announce | None:
    """`announce(cell, lifetime, role)`, to be held while the engine runs; None where nobody would see it.

    Writes ` [CELL PART ...` at the start and ` SECONDS s]` at the end.
    """
    if hasattr(config, "workerinput") or os.environ.get("CI") or os.environ.get("BUILD_NUMBER") or config.get_verbosity() < 0:
        return None

    @contextlib.contextmanager
    def announce(cell: Cell, lifetime: int, role: str) -> Iterator[None]:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or not reporter.isatty:
            yield
            return
        began = clock()
        part = _PARTS.get(role, role) + (f", lifetime {lifetime + 1}" if lifetime else "")
        reporter.write(f" [{cell} {part} ...", light=True)
        reporter.flush()
        try:
            yield
        finally:
            reporter.write(f" {clock() - began:.1f} s]", light=True)
            reporter.flush()

    return announce
