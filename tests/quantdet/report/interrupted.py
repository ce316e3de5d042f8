"""Runs that end before their cases do (Ctrl-C, a signal, -x, a crash of pytest): their reports must not read as whole."""

import pytest

from quantdet.report.record import RECORDS

_WHY: dict[int, str] = {
    pytest.ExitCode.INTERRUPTED: "interrupted",
    pytest.ExitCode.INTERNAL_ERROR: "internal error of pytest or a plugin",
}


def finish(session: pytest.Session) -> None:
    """Keep what is to be said in `Records.cut`; on the controller, before any report is written."""
    config = session.config
    if hasattr(config, "workerinput") or config.getoption("collectonly"):
        return
    records, limit = config.stash[RECORDS], config.getoption("maxfail")
    stopped = limit and session.testsfailed >= limit
    why = "stopped by -x or --maxfail" if stopped else _WHY.get(session.exitstatus, "")
    records.cut = said(session.testscollected, len(records.finished), why)


def said(selected: int, finished: int, why: str) -> str:
    """The sentence; empty if every selected case was reached, or if there was none and nothing ended the run."""
    if finished >= selected and (selected or not why):
        return ""
    return f"CUT SHORT: {finished} of {selected} selected cases ran" + (f" ({why})" if why else "")
