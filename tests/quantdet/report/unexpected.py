"""The unexpected on the terminal: an entry for each cause, in place of pytest's own lines for each of its cases."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from quantdet.report import entries, record, rerun
from quantdet.report.run import RUN
from quantdet.report.text_layout import prose

_EXCERPT = "    | "


@contextlib.contextmanager
def apart(reporter: Any) -> Iterator[None]:
    """Around pytest's own summaries: what was judged is not in them, only in the counts of the last line.

    What failed without a judgement (a crash, a test of the user's) is theirs.
    """
    failed = reporter.stats.get("failed", [])
    if any(map(record.unexpected, failed)):
        reporter.stats["failed"] = [report for report in failed if not record.unexpected(report)]
    try:
        yield
    finally:
        if failed:
            reporter.stats["failed"] = failed


def summary(reporter: Any, config: pytest.Config) -> None:
    """The entries, each with the command that runs it again. `--tb=line` leaves the first lines, `--tb=no` no details."""
    found = entries.of(config.stash[record.RECORDS].cases)
    if not found or reporter.no_summary:
        return
    width, run = max(80, min(reporter._tw.fullwidth, 160)), config.stash[RUN]
    reporter.write_sep("=", f"quantdet: unexpected ({entries.said(found)})")
    style = config.getoption("tbstyle")
    for entry in found:
        reporter.write_line(prose(entry.first, width), red=True)
        if style == "line":
            continue
        for line in entry.lines if style != "no" else ():
            reporter.write_line(_fitted(line, width))
        reporter.write_line(prose(f"  {entry.took}", width))
        reporter.write_line(f"  rerun: {rerun.entry(run, entry)}")  # in one line, to be pasted


def _fitted(line: str, width: int) -> str:
    """A line of a log is cut rather than broken: whole it is in the JUnit file, and in the log."""
    if line.startswith(_EXCERPT):
        return line if len(line) <= width else line[: width - 3] + "..."
    return line if line.startswith("  log: ") else prose(f"  {line.strip()}", width)
