"""The end summary: verdicts, times, distances and classes, re-executions, and what was not measured."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from quantdet.engines.child.stopwatch import PARTS
from quantdet.engines.clock import Clock
from quantdet.report import confidence, effects, hidden_states, nearest, reexecution, rerun, speed
from quantdet.report.absent_hardware import Elsewhere
from quantdet.report.case import Case, Place
from quantdet.report.entries import cell_of, counted
from quantdet.report.record import RECORDS, Records
from quantdet.report.run import RUN
from quantdet.report.text_layout import figure, fitted, prose, told

_APART = ("test_versions", "test_reexecution", "test_question")  # have tables of their own


def summary(reporter: Any, config: pytest.Config) -> None:
    """For `pytest_terminal_summary`, on the controller."""
    records, run = config.stash[RECORDS], config.stash[RUN]
    width = max(80, min(reporter._tw.fullwidth, 160))

    def say(text: str) -> None:
        reporter.write_line(prose(text, width))

    if records.cases:
        reporter.write_sep("=", "quantdet: verdicts")
        order = list(run.formats)
        for table in matrix_tables(records, order, width):
            reporter.write_line(table)
        for where, text in confidence.controls(records.cases).items():
            say(f"controls on {where}: {text}")
        for text in filter(None, (confidence.at_once(records.cases), confidence.multiplicity(records.cases))):
            say(text)
        if run.clock.cells > run.clock.reused:
            for table in time_tables(records, width):
                reporter.write_line(table)
        for table in (*speed.sections(records.cases, width), *version_tables(records, width)):
            reporter.write_line(table)
        _section(reporter, "effects", effects.within_hardware(records.cases, order, width))
        _section(reporter, "comparisons", effects.comparison_results(records.cases, width))
        _section(reporter, "checkpoints", effects.checkpoints_apart(records.cases, width))
        _section(reporter, "published questions", questions(records, width))
        _section(reporter, "re-executions", nearest.sections(records.cases, order, width))
        _section(reporter, "hidden states", hidden_states.sections(reexecution.verifications(records.cases, order), width))
        declared = [case for case in records.cases if case.outcome == "skipped" and case.expected]
        texts = [f"{case.message}; declared: {case.expectation}" for case in declared]
        _section(reporter, "as declared (xfail)", [prose(text, width) for text in texts])
    _skipped(reporter, records, run.hardware, width)
    if text := engines(run.clock):
        say(text)
    for aside in run.set_aside:
        reporter.write_line(f"put aside, damaged or edited, and measured again: {aside}")
    if records.cut:
        say(records.cut)
    if run.injected:
        say(f"SEEDED DEFECT in this run: QUANTDET_INJECT={run.injected}")
    if records.first_failure:  # in one line, to be pasted
        reporter.write_line(f"rerun the first failure without a verdict: {rerun.command(run, records.first_failure)}")


def questions(records: Records, width: int) -> list[str]:
    """The answers, each under what was asked."""
    asked = [case for case in records.cases if case.test == "test_question"]
    return [
        prose(text, width) for case in asked for text in (case.text("asks"), case.message + ("" if case.expected else " !"))
    ]


def _section(reporter: Any, title: str, texts: list[str]) -> None:
    if texts:
        reporter.write_sep("=", f"quantdet: {title}")
    for text in texts:
        reporter.write_line(text)


def engines(clock: Clock) -> str:
    """How many engines were started, what for, and where the time went; empty if none was and the store gave nothing."""
    kinds = (
        (clock.lifetimes, "cell lifetime"), (clock.controls, "control"), (clock.verifications, "re-execution"),
        (clock.traces, "trace"),
    )  # fmt: skip
    started = sum(count for count, _ in kinds)
    if not started and not clock.cells:
        return ""
    parts = ", ".join(counted(count, word) for count, word in kinds if count)
    text = f"engines: {started} started{f' ({parts})' if parts else ''}"
    text += f"; {counted(clock.cells, 'cell')}" if clock.cells else ""
    if clock.reused:
        text += f", {clock.reused} of {'them' if clock.cells > 1 else 'it'} from the store (--fresh measures again)"
    return (
        f"{text}; {figure(clock.engines)} s in engines, "
        f"{f'of these {figure(clock.measuring)} s measuring' if clock.measuring else 'none of it measuring'}"
        f"{f' ({clock.untimed} did not say)' if clock.untimed else ''}; "
        f"{figure(clock.checkpoints)} s for checkpoints"
    )


def matrix_tables(records: Records, order: list[str], width: int) -> list[str]:
    """Per model and hardware: format (in the matrix's order) -> verdicts, kernel, n, bound."""
    places: dict[Place, dict[str, dict[str, Case]]] = {}
    for case in records.cases:
        if case.test in _APART:
            continue
        name = case.test.removeprefix("test_")
        name += f" {case.phase}" if case.test in ("test_repeat", "test_hidden_states") else ""
        places.setdefault(case.place, {}).setdefault(case.format, {})[name] = case
    return [
        _matrix_table(where, {name: formats[name] for name in order if name in formats}, width)
        for where, formats in places.items()
    ]


def version_tables(records: Records, width: int) -> list[str]:
    """Per model and hardware: format -> the same raw logits in every recorded vLLM version or not, and what ran."""
    places: dict[Place, list[Case]] = {}
    for case in records.cases:
        if case.test == "test_versions":
            places.setdefault(case.place, []).append(case)
    tables = []
    for where, cases in places.items():
        versions = max((case.names("versions") for case in cases), key=len)
        title = f"{where}: raw logits, vLLM {' against '.join(versions)} (L2 and max: of the reported logprobs, nats)"
        kernels = [f"kernel in {version}" for version in versions]
        rows = []
        for case in cases:
            executed = [case.text(f"kernel.executed@{version}") for version in versions]
            figures = map(_short, (case.number("l2"), case.number("max_abs_diff")))
            rows.append((case.format, _word(case), *figures, *(_kernel(name, None) for name in executed)))
        columns = ("format", "logits", "L2", "max", *kernels)
        tables.append(fitted(columns, rows, width, fold=(*kernels, "format"), title=title))
    return tables


def _matrix_table(where: Place, formats: dict[str, dict[str, Case]], width: int) -> str:
    restarts = any("restart" in cases for cases in formats.values())
    hidden = any(name.startswith("hidden_states") for cases in formats.values() for name in cases)
    rows = []
    for format_, cases in formats.items():
        some = cases.get("repeat decode") or cases.get("repeat prefill") or next(iter(cases.values()))
        words = {name: _word(cases.get(name)) for name in ("repeat decode", "repeat prefill", "distinct", "restart")}
        if "refusal" in cases:
            words = {**dict.fromkeys(words, ""), "repeat decode": _word(cases["refusal"])}
        # First what the kernel's verdict is about: of several lifetimes the one that it names.
        judged = [cases["kernel"]] if "kernel" in cases else []
        executed = [case.executed for case in (*judged, *cases.values())]
        rows.append((
            format_, words["repeat decode"], words["repeat prefill"],
            _kernel(next(filter(None, executed), ""), cases.get("kernel")), words["distinct"],
            *([words["restart"]] if restarts else []), *([hidden_states.word(cases)] if hidden else []),
            "" if some.flip_rate is None or some.runs is None else str(some.runs),
            _short(some.flip_rate),
        ))  # fmt: skip
    columns = ("format", "decode", "prefill", "kernel", "distinct", *(["restart"] if restarts else []))
    columns = (*columns, *(["layers"] if hidden else []), ">n", ">flips <")
    return fitted(columns, rows, width, fold=("kernel", "format"), title=str(where))


def time_tables(records: Records, width: int) -> list[str]:
    """Per model and hardware: where the time of each cell's (first) engine lifetime went, slowest first."""
    places: dict[Place, dict[str, dict[str, float]]] = {}
    for case in records.cases:
        if parts := {name: told(value) for name, value in case.parts("seconds").items()}:
            places.setdefault(case.place, {})[case.format] = parts
    tables = []
    for where, cells in places.items():
        # A part that took no time in any cell is not worth a column.
        names = [name for name in (part.removesuffix("_s") for part in PARTS) if any(row.get(name) for row in cells.values())]
        rows = []
        for format_, parts in sorted(cells.items(), key=lambda row: -sum(row[1].values())):
            figures = (*(parts.get(name) for name in names), sum(parts.values()))
            rows.append((format_, *("" if value is None else figure(value) for value in figures)))
        columns = ("format", *(f">{name}" for name in (*names, "total")))
        tables.append(fitted(columns, rows, width, fold=("format",), title=f"{where}: seconds"))
    return tables


def _word(case: Case | None) -> str:
    if case is None:
        return ""
    return str(case.verdict) + ("" if case.expected else " !")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _kernel(executed: str, case: Case | None) -> str:
    for ending in ("LinearKernel", "LinearMethod", "ScaledMMKernel", "ScaledMM"):  # no news, much room
        executed = executed.replace(ending, "")
    text = executed
    if case is not None and case.weight_only:
        text += " weight-only"
    return text + (f" {case.verdict} !" if case is not None and not case.expected else "")


def _skipped(reporter: Any, records: Records, hardware: Mapping[str, str], width: int) -> None:
    """What was not measured: a line for each row of hardware that is not here, then cells by reason, most first."""
    cells: dict[str, set[str]] = {}
    apart: Counter[Elsewhere] = Counter()
    for nodeid, reason in records.skipped:
        if (elsewhere := records.elsewhere.get(nodeid)) is not None:
            apart[elsewhere] += 1
        elif "[" in nodeid and nodeid not in records.declared:  # those stand in the table, by test_refusal
            cells.setdefault(reason, set()).add(cell_of(nodeid))
    if not cells and not apart:
        return
    reporter.write_sep("=", "quantdet: not measured")
    order = list(hardware)
    for (row, lacks), count in sorted(apart.items(), key=lambda one: (order.index(one[0][0]), -one[1])):
        title = f" ({hardware[row]})"
        why = lacks.replace(title, "")
        reporter.write_line(prose(f"{row}{title}: {counted(count, 'case')}, {why}", width))
    counts = Counter({reason: len(group) for reason, group in cells.items()})
    for reason, count in counts.most_common():
        reporter.write_line(prose(f"{count:4d} {'cell ' if count == 1 else 'cells'}  {reason}", width))
