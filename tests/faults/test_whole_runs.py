"""Whole runs with the fake engine that take longer than a self-test: more ways to be ended, and two at the same time."""

import signal
from pathlib import Path

import pytest

from faults.cases import rows, shows
from selftest.fakes.inner import Suite, read_junit
from selftest.fakes.matrix import make_suite, setting
from selftest.fakes.whole import AWQ, TWO, ended, noted, nothing_stayed, of, started, starts
from selftest.fakes.whole import temporary as temporary

pytest_plugins = ["pytester"]


def here(test: str) -> list[str]:
    return rows(f"faults/test_whole_runs.py::{test}")


SIGNALS: dict[str, tuple[signal.Signals, tuple[str, ...]]] = {
    "sighup": (signal.SIGHUP, ()), "sigkill-run": (signal.SIGKILL, ()),
    "sigterm-workers": (signal.SIGTERM, ("-n", "2", "-p", "xdist")),
}  # fmt: skip


@pytest.mark.parametrize("id_", here("test_a_run_that_is_ended"))
def test_a_run_that_is_ended(suite: Suite, tmp_path: Path, temporary: Path, pytester: pytest.Pytester, id_: str) -> None:
    """Whatever ends the run: what was judged is reported, what was measured stays, nothing else does."""
    ended(id_, *SIGNALS[id_], suite, tmp_path, temporary, pytester.path)


@pytest.mark.parametrize("id_", here("test_two_runs_on_one_store"))
def test_two_runs_on_one_store(tmp_path: Path, temporary: Path, pytester: pytest.Pytester, id_: str) -> None:
    """Both measure the same cell at the same moment: both judge it, and the store has one whole observation."""
    make_suite(pytester.path, noted(tmp_path) + setting("awq", "meet"))
    reports = [f"--junitxml={tmp_path / name}" for name in "ab"]

    runs = [started(pytester.path, "-k", f"{TWO} and awq", report) for report in reports]
    said = [run.communicate(timeout=180)[0] for run in runs]

    assert ["alpha/awq"] * 2 == starts(tmp_path)
    for name, run, words in zip("ab", runs, said, strict=True):
        assert 0 == run.returncode, words
        cases, _ = read_junit(tmp_path / name)
        assert of(AWQ) == {case for case, found in cases.items() if found.outcome == "passed"}
        shows(id_, cases[f"test_repeat[{AWQ}-decode]"].verdict, words)
    nothing_stayed(tmp_path, temporary, pytester.path / "s", [AWQ])
