"""One record per test: rides on pytest's report object, so that it reaches the controller under pytest-xdist."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from quantdet.judging.verdicts import Divergence, Judgement, Violation
from quantdet.matrix.cell import Cell
from quantdet.report import absent_hardware
from quantdet.report.absent_hardware import Elsewhere
from quantdet.report.case import Case, SharedCause

# What is asked of a cell before anything else, in this order: in a run, in tables, on the page.
FIRST = ("test_repeat", "test_kernel", "test_distinct")


def cell_of(item: pytest.Item) -> Cell | None:
    """The cell that a test is about; None for a self-test."""
    callspec = getattr(item, "callspec", None)
    given = callspec.params if callspec is not None else {}
    cell = given.get("cell") or given.get("claim") or given.get("question")
    return cell if isinstance(cell, Cell) else None


def place_of(test: str) -> int:
    """Where a test stands: its place in `FIRST`, or behind all of these."""
    return FIRST.index(test) if test in FIRST else len(FIRST)


JUDGEMENT = pytest.StashKey[Judgement]()
EVIDENCE = pytest.StashKey[dict[str, Any]]()
FIGURES = pytest.StashKey[dict[str, Any]]()  # by the name of the property, as data
DECLARED_SKIP = pytest.StashKey[bool]()  # of an item whose cell is declared unsupported, which another case judges
_ATTRIBUTE = "quantdet_record"
_DECLARED = "quantdet_declared"


@dataclass(eq=False)  # a plugin: pluggy puts plugins into sets
class Records:
    """Registered as a plugin on the controller; collects what every test said, in the order of arrival."""

    cases: list[Case] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: dict[str, Elsewhere] = field(default_factory=dict)  # of these: what is not here
    declared: set[str] = field(default_factory=set)  # of these: declared unsupported, and judged by another case
    broken: list[tuple[str, str]] = field(default_factory=list)  # failed without a judgement: a crashed worker, say
    first_failure: str = ""  # of those without a judgement: the others have their entries
    finished: set[str] = field(default_factory=set)
    cut: str = ""  # see `interrupted.said`

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a case's record, or the reason why there is none."""
        if report.when not in ("setup", "call"):  # also what xdist reports in place of a case that took its worker along
            self.finished.add(report.nodeid)
        if report.failed and not self.first_failure and not unexpected(report):
            self.first_failure = report.nodeid
        record = getattr(report, _ATTRIBUTE, None)
        if record is not None:
            self.cases.append(replace(Case.from_json(record), nodeid=report.nodeid, outcome=report.outcome))
        elif report.failed:
            self.broken.append((report.nodeid, str(report.longrepr)[:2000]))
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped.append((report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")))
            if (lacking := absent_hardware.of(report)) is not None:
                self.elsewhere[report.nodeid] = lacking
            if getattr(report, _DECLARED, False):
                self.declared.add(report.nodeid)


RECORDS = pytest.StashKey[Records]()


def unexpected(report: Any) -> bool:
    """Whether a report says that a case failed by its judgement."""
    record = getattr(report, _ATTRIBUTE, None)
    return bool(report.failed and record is not None and not record["expected"])


def attach(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> pytest.TestReport:
    """Put the judgement on the report; a failed one shows its own text instead of a traceback."""
    if item.stash.get(DECLARED_SKIP, False):
        setattr(report, _DECLARED, True)
    if call.when != "call":
        return report
    judgement = item.stash.get(JUDGEMENT, None)
    if judgement is None:
        return report
    cause = judgement.cause
    case = Case(
        nodeid=report.nodeid,
        test=getattr(item, "originalname", item.name),
        outcome=report.outcome,
        verdict=judgement.verdict,
        where=judgement.where,
        why=judgement.why,
        message=judgement.message,
        # A declared divergence is an xfail that was satisfied.
        expected=judgement.expected or (report.skipped and hasattr(report, "wasxfail")),
        detail=judgement.detail,
        cause=None if cause is None else SharedCause(str(cause.cell), cause.first, cause.detail),
        among=tuple(sorted(judgement.among)),
        pairs=judgement.pairs,
        reexecution=judgement.reexecution,
        evidence=item.stash.get(EVIDENCE, {}),
        figures=_figures(item),
    )
    setattr(report, _ATTRIBUTE, case.to_json())
    if report.failed and call.excinfo is not None and call.excinfo.errisinstance((Divergence, Violation)):
        report.longrepr = str(call.excinfo.value)
    if hasattr(report, "wasxfail") and report.skipped:
        report.wasxfail = f"{judgement.message} ({report.wasxfail})"
    return report


def _figures(item: pytest.Item) -> dict[str, Any]:
    """What the item says of itself, and the figures of its judgement: those that there are. Verdict and pairs are apart."""
    known = {str(name): value for name, value in item.user_properties} | item.stash.get(FIGURES, {})
    return {
        name: value for name, value in known.items() if value is not None and name != "verdict" and not name.startswith("pair.")
    }
