"""Cases of hardware that is not here, or that a replay has nothing of: whole in the JUnit file, a line a row on the terminal.

A run here has thousands of them for a hundred that it judges: no letters, no names of files, no part of the percentages.
With -v they are shown as any other.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol


class Elsewhere(NamedTuple):
    """The hardware row that a case would have needed, and what it lacks there."""

    row: str
    lacks: str


ELSEWHERE = pytest.StashKey[Elsewhere]()  # of an item
_ATTRIBUTE = "quantdet_elsewhere"


def quiet(config: pytest.Config) -> bool:
    """Whether they are left out of the progress; the same on the controller and its workers."""
    return config.get_verbosity(pytest.Config.VERBOSITY_TEST_CASES) <= 0


def protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run such a case without the announcement that pytest begins a line with; None leaves any other to pytest."""
    if ELSEWHERE not in item.stash or not quiet(item.config):
        return None
    runtestprotocol(item, nextitem=nextitem, log=True)
    return True


def attach(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put it on the report of a skip, so that it crosses xdist."""
    if ELSEWHERE in item.stash and report.skipped:
        found = item.stash[ELSEWHERE]
        setattr(report, _ATTRIBUTE, [found.row, found.lacks])


def of(report: Any) -> Elsewhere | None:
    """What a skipped case would have needed; None if its hardware is here."""
    found = getattr(report, _ATTRIBUTE, None)
    return None if found is None else Elsewhere(*found)


def status(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """Counted among the skipped, without letter and word."""
    return ("skipped", "", "") if of(report) and quiet(config) else None


@contextlib.contextmanager
def uncounted(session: pytest.Session) -> Iterator[None]:
    """While tests run, percentages are of those that are shown.

    Under xdist the controller has no items: it takes those that are not shown off as their reports come.
    """
    if not quiet(session.config):
        yield
        return
    arriving = _Arriving(session)
    arriving.take(sum(ELSEWHERE in item.stash for item in session.items))
    if not session.items:
        session.config.pluginmanager.register(arriving)
    try:
        yield
    finally:
        if session.config.pluginmanager.is_registered(arriving):
            session.config.pluginmanager.unregister(arriving)
        arriving.take(-arriving.taken)


class _Arriving:
    """What was taken off a session's number of tests, to be given back."""

    def __init__(self, session: pytest.Session) -> None:
        self.session, self.taken = session, 0

    def take(self, count: int) -> None:
        self.session.testscollected -= count
        self.taken += count

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if of(report):
            self.take(1)
