"""`--report DIR`: `DIR/report.html`, one file that needs nothing else, rendered from `DIR/cases.jsonl` beside it."""

import os
from pathlib import Path
from typing import Any

import pytest

from quantdet.report.html import data, gather
from quantdet.report.record import RECORDS
from quantdet.report.run import RUN

PAGE = "report.html"
_WRITTEN = pytest.StashKey[str]()


def finish(session: pytest.Session) -> None:
    """Write data and page; on the controller only."""
    config = session.config
    run = config.stash.get(RUN, None)
    if run is None or run.report is None or config.getoption("collectonly"):
        return
    try:
        config.stash[_WRITTEN] = (
            f"report: {render(data.write(gather.gather(run, config.stash[RECORDS], run.report), run.report))}"
        )
    except Exception as error:  # the JUnit file is written after it; a run that lost what it was asked for is not green
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.stash[_WRITTEN] = f"no report: {type(error).__name__}: {error}"


def announce(reporter: Any, config: pytest.Config) -> None:
    """Say where the page is."""
    text = config.stash.get(_WRITTEN, "")
    if text:
        reporter.write_line(text)


def render(cases: Path) -> Path:
    """Render the page from `cases.jsonl`, beside it; whole or not at all.

    Raises:
        quantdet.report.html.data.DataError: not such a file.
    """

    from quantdet.report.html import page  # jinja2 only where a page is wanted

    text = page.text(data.read(cases))
    unfinished = cases.parent / f".{PAGE}"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, cases.parent / PAGE)
    return cases.parent / PAGE
