"""Signals that end a run: what they become, and that none of them comes between a beginning and its end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from faults.cases import rows, shows
from quantdet.engines.process import interrupts
from quantdet.engines.process.interrupts import Terminated, held, install
from selftest.fakes.matrix import TESTS


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as a fresh process has them, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in interrupts.ENDING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ending_signals_unwind() -> None:
    """SIGTERM raises where the run is, as Ctrl-C does; undone, the signal is as it was."""
    undo = install()
    with pytest.raises(Terminated, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGHUP"):
        os.kill(os.getpid(), signal.SIGHUP)

    undo()

    assert [signal.SIG_DFL] * 2 == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]


def test_an_ignored_signal_stays_ignored() -> None:
    """Under nohup a run outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    undo = install()
    os.kill(os.getpid(), signal.SIGHUP)
    undo()

    assert signal.SIG_IGN is signal.getsignal(signal.SIGHUP)


def test_held_signals_wait_for_the_end() -> None:
    """Blocks inside one another are one; the signal comes once the outer one is over, and the handler is back."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held(), held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("inner")
        done.append("not reached")

    assert ["inner"] == done
    assert signal.default_int_handler is signal.getsignal(signal.SIGINT)


def test_a_second_signal_does_not_cut_off_the_cleaning_up() -> None:
    """Who presses twice gets one KeyboardInterrupt, and what cleans up runs to its end."""
    done = []
    with pytest.raises(KeyboardInterrupt), held() as pending:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            pending.let()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("cleaned up")

    assert ["cleaned up"] == done


def test_a_part_may_be_cut_off() -> None:
    """Where it is allowed the signal comes at once, one that waited too."""
    done = []
    with pytest.raises(KeyboardInterrupt), held() as pending, pending.allowed():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not reached")
    with pytest.raises(KeyboardInterrupt), held() as pending:
        os.kill(os.getpid(), signal.SIGINT)
        with pending.allowed():
            done.append("not reached")

    assert [] == done


@pytest.mark.parametrize("id_", rows("selftest/engines/test_interrupts.py::test_a_signal_at_any_line"))
def test_a_signal_at_any_line(id_: str) -> None:
    """SIGINT at every sixth line of what measures a cell (every line: 6 becomes 1): no process, no file, no handler stays."""
    command = [sys.executable, "-m", "selftest.fakes.interrupting", "6"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=True, timeout=120
    )  # fmt: skip
    found = json.loads(done.stdout)

    assert found["lines"] > 120
    every = found["cut"] == len(range(1, found["lines"] + 1, 6))
    shows(id_, "KeyboardInterrupt" if every else "no exception", done.stdout)
