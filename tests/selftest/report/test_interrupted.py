"""Runs that end before their cases do: page, JUnit file, job summary and terminal say so, and nothing looks whole."""

from pathlib import Path
from typing import Any

import pytest

from quantdet.report import html, interrupted, markdown
from quantdet.report.html import data
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, setting

pytest_plugins = ["pytester"]

NOISY = MATRIX + setting("awq", "noise")
TWO = "alpha and cpu-here and (awq or bf16)"
# Ctrl-C after the third case.
INTERRUPT = """
import os, signal
_seen = []
def pytest_runtest_logreport(report):
    if report.when == "teardown" and "cpu-here" in report.nodeid:
        _seen.append(report.nodeid)
        if len(_seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("selected", "finished", "why", "words"),
    [
        (5, 5, "", ""),
        (0, 0, "", ""),
        (5, 5, "stopped by -x or --maxfail", ""),  # by its last case
        (5, 3, "", "CUT SHORT: 3 of 5 selected cases ran"),
        (5, 3, "interrupted", "CUT SHORT: 3 of 5 selected cases ran (interrupted)"),
        (0, 0, "interrupted", "CUT SHORT: 0 of 0 selected cases ran (interrupted)"),
    ],
)
def test_the_sentence(selected: int, finished: int, why: str, words: str) -> None:
    assert words == interrupted.said(selected, finished, why)


def test_a_whole_run_says_nothing(suite: Suite) -> None:
    """Also with cases that fail, are skipped or are left out."""
    run = suite("-k", TWO, "--report", "r", matrix=NOISY)

    assert run.failures()
    assert "CUT SHORT" not in run.output + Path("r", html.PAGE).read_text() + run.suite["summary"]


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_the_first_failure_ends_the_run(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    """In the first line of each report, and coverage does not call what was not reached unselected."""
    summary = tmp_path / "summary.md"
    monkeypatch.setenv(markdown.VARIABLE, str(summary))

    run = suite("-k", f"{TWO} or beta", "-x", "--report", "r", *workers, matrix=NOISY, apart=bool(workers))

    sentence = run.suite["summary"].partition(";")[0]
    assert sentence.startswith("CUT SHORT: ")
    assert sentence.endswith(" selected cases ran (stopped by -x or --maxfail)")
    assert sentence in run.output
    assert f"<strong>{sentence}</strong>" in Path("r", html.PAGE).read_text()
    assert f"## quantdet\n\n{sentence}" in summary.read_text()
    reasons = {row.get("reason", "") for row in data.read(Path("r", data.CASES)).run["coverage"]}
    words = "not selected, or not reached before" if workers else "selected, not reached:"
    assert f"{words} the run was cut short" in reasons


def test_ctrl_c_leaves_reports_that_say_so(suite: Suite) -> None:
    """What was judged is there, but nothing says that every verdict is as expected."""
    run = suite("-k", TWO, "--report", "r", machine=INTERRUPT, apart=True)

    page = Path("r", html.PAGE).read_text()
    assert pytest.ExitCode.INTERRUPTED == run.code
    sentence = run.suite["summary"].partition(";")[0]
    assert sentence.startswith("CUT SHORT: ")
    assert sentence.endswith(" selected cases ran (interrupted)")
    assert f"<strong>{sentence}</strong>" in page
    assert "So far every verdict is what the matrix expects" in page
    assert 'class="calm"' not in page
    assert 'class="good"' not in page


def test_a_report_that_cannot_be_written_is_refused_at_the_start(suite: Suite, tmp_path: Path) -> None:
    """Not after the engines have run."""
    (tmp_path / "file").touch()

    run = suite("-k", TWO, "--report", f"{tmp_path}/file/r")

    assert pytest.ExitCode.USAGE_ERROR == run.code
    assert f"--report: {tmp_path}/file/r cannot be written: Not a directory" in run.output


def test_a_report_that_is_lost_in_the_end_fails_the_run(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JUnit file is whole."""

    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "render", full)
    run = suite("-k", f"{TWO} and test_kernel", "--report", "r")

    assert pytest.ExitCode.TESTS_FAILED == run.code
    assert {} == run.failures()
    assert "no report: OSError: [Errno 28] No space left on device" in run.output
