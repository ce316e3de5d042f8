"""One line per engine start, so that a slow start is not taken for a hang. Off under xdist workers and in CI."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from quantdet.schema import Cell


def announcer(config: pytest.Config) -> Callable[[Cell, int], None] | None:
    """A function that says which engine starts, or None where nobody would see it."""
    if hasattr(config, "workerinput") or os.environ.get("CI") or config.get_verbosity() < 0:
        return None

    def announce(cell: Cell, lifetime: int) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            reporter.write(f" [{cell}{f' lifetime {lifetime}' if lifetime else ''}]", light=True)
            reporter.flush()

    return announce
