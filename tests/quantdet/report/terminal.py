"""The end summary: verdicts, times, distances and classes, re-executions, and what was not measured."""

import shlex
from collections import Counter
from typing import Any

import pytest
from rich.markup import escape
from rich.table import Table

from quantdet import collect
from quantdet.collect import DECLARED
from quantdet.engines.stopwatch import PARTS
from quantdet.report import activations, confidence, effects, reexecution
from quantdet.report.record import RECORDS, Records
from quantdet.report.tables import place, render

_APART = ("test_versions", "test_reexecution")  # have tables of their own


def summary(reporter: Any, config: pytest.Config) -> None:
    """For `pytest_terminal_summary`, on the controller."""
    records = config.stash[RECORDS]
    width = max(80, min(reporter._tw.fullwidth, 160))
    if records.cases:
        reporter.write_sep("=", "quantdet: verdicts")
        order = list(config.stash[collect.SESSION].matrix.formats)
        for table in matrix_tables(records, order):
            reporter.write_line(render(table, width))
        for where, text in confidence.controls(records.cases).items():
            reporter.write_line(f"controls on {where}: {text}")
        for text in filter(None, (confidence.at_once(records.cases), confidence.multiplicity(records.cases))):
            reporter.write_line(text)
        clock = config.stash[collect.SESSION].clock
        if clock.cells > clock.reused:
            for table in time_tables(records):
                reporter.write_line(render(table, width))
        for table in version_tables(records):
            reporter.write_line(render(table, width))
        _section(reporter, "effects", effects.within_hardware(records.cases, order, width))
        _section(reporter, "comparisons", effects.comparison_results(records.cases, width))
        _section(reporter, "re-executions", reexecution.sections(records.cases, order, width))
        _section(reporter, "hidden states", activations.sections(reexecution.verifications(records.cases, order), width))
    _skipped(reporter, records)
    clock = config.stash[collect.SESSION].clock
    if clock.cells:
        reporter.write_line(
            f"engines: {clock.cells} cells, {clock.reused} of them from the store (--fresh measures again); "
            f"{clock.engines:.1f} s in engines, of these {clock.measuring:.1f} s measuring; "
            f"{clock.checkpoints:.1f} s for checkpoints"
        )
    session = config.stash[collect.SESSION]
    for aside in session.store.set_aside:
        reporter.write_line(f"put aside, damaged or edited, and measured again: {aside}")
    if session.inject is not None:
        reporter.write_line(f"SEEDED DEFECT in this run: QUANTDET_INJECT={':'.join(session.inject)}")
    if records.first_failure:
        reporter.write_line(f"rerun the first failure: {_command(config, records.first_failure)}")


def _section(reporter: Any, title: str, texts: list[str]) -> None:
    if texts:
        reporter.write_sep("=", f"quantdet: {title}")
    for text in texts:
        reporter.write_line(text)


def _command(config: pytest.Config, nodeid: str) -> str:
    """What to paste: the case, and the options and the variable that it depended on."""
    session = config.stash[collect.SESSION]
    words = ["pytest", nodeid]
    for name in ("--matrix", "--store", "--replay", "--repeats", "--max-flip-rate", "--lifetimes"):
        given = config.getoption(name)
        words += [f"{name}={value}" for value in (given if isinstance(given, list) else [given]) if value is not None]
    prefix = f"QUANTDET_INJECT={shlex.quote(':'.join(session.inject))} " if session.inject else ""
    return prefix + shlex.join(words)  # an id may hold shell characters


def matrix_tables(records: Records, order: list[str]) -> list[Table]:
    """Per model and hardware: format (in the matrix's order) -> verdicts, kernel, n, bound."""
    places: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for case in records.cases:
        if case["test"] in _APART:
            continue
        p = case["properties"]
        name = case["test"].removeprefix("test_") + (f" {p['case.phase']}" if case["test"] == "test_repeat" else "")
        places.setdefault(place(p), {}).setdefault(p["case.format"], {})[name] = case
    return [
        _matrix_table(where, {name: formats[name] for name in order if name in formats}) for where, formats in places.items()
    ]


def version_tables(records: Records) -> list[Table]:
    """Per model and hardware: format -> the same raw logits in every recorded vLLM version or not, and what ran."""
    places: dict[str, list[dict[str, Any]]] = {}
    for case in records.cases:
        if case["test"] == "test_versions":
            places.setdefault(place(case["properties"]), []).append(case)
    tables = []
    for where, cases in places.items():
        versions = max((case["properties"]["versions"].split(",") for case in cases), key=len)
        title = f"{where}: raw logits, vLLM {' against '.join(versions)} (L2 and max: of the reported logprobs, nats)"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("format", "logits", "L2", "max", *(f"kernel in {version}" for version in versions)):
            table.add_column(column, overflow="fold", no_wrap=not column.startswith("kernel"))
        for case in cases:
            p = case["properties"]
            executed = [p.get(f"kernel.executed@{version}", "") for version in versions]
            figures = [f"{float(p[name]):.3g}" if p.get(name) else "" for name in ("l2", "max_abs_diff")]
            table.add_row(p["case.format"], _word(case), *figures, *(_kernel(name, None) for name in executed))
        tables.append(table)
    return tables


def _matrix_table(where: str, formats: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(title=where, title_justify="left", box=None, pad_edge=False, header_style="bold")
    restarts = any("restart" in cases for cases in formats.values())
    for column in ("format", "decode", "prefill", *(["restart"] if restarts else []), "distinct", "kernel", "n", "flips <"):
        table.add_column(column, overflow="fold", no_wrap=column != "kernel")
    for format_, cases in formats.items():
        some = cases.get("repeat decode") or cases.get("repeat prefill") or next(iter(cases.values()))
        p = some["properties"]
        names = ("repeat decode", "repeat prefill", *(["restart"] if restarts else []), "distinct")
        words = [_word(cases.get(name)) for name in names]
        if "hardware" in cases:
            words = [_word(cases["hardware"]), *("" for _ in names[1:])]
        executed = [case["properties"].get("kernel.executed", "") for case in cases.values()]
        bound = p.get("flip_rate_upper95", "")
        table.add_row(
            format_, *words, _kernel(next(filter(None, executed), ""), cases.get("kernel")),
            p.get("runs", "") if bound else "",
            f"{float(bound):.3g}" if bound else "",
        )  # fmt: skip
    return table


def time_tables(records: Records) -> list[Table]:
    """Per model and hardware: where the time of each cell's (first) engine lifetime went, slowest first."""
    places: dict[str, dict[str, dict[str, float]]] = {}
    for case in records.cases:
        p = case["properties"]
        if p.get("seconds"):
            parts = {name: float(value) for name, _, value in (part.partition("=") for part in p["seconds"].split())}
            places.setdefault(place(p), {})[p["case.format"]] = parts
    tables = []
    for where, cells in places.items():
        names = [name for name in (part.removesuffix("_s") for part in PARTS) if any(name in row for row in cells.values())]
        table = Table(title=f"{where}: seconds", title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("format", no_wrap=True)
        for name in (*names, "total"):
            table.add_column(name, justify="right")
        for format_, parts in sorted(cells.items(), key=lambda row: -sum(row[1].values())):
            figures = (*(parts.get(name, 0.0) for name in names), sum(parts.values()))
            table.add_row(format_, *(f"{value:.1f}" for value in figures))
        tables.append(table)
    return tables


def _word(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    return str(case["verdict"]) + ("" if case["expected"] else " !")


def _kernel(executed: str, case: dict[str, Any] | None) -> str:
    for ending in ("LinearKernel", "LinearMethod", "ScaledMMKernel", "ScaledMM"):  # no news, much room
        executed = executed.replace(ending, "")
    text = escape(executed)  # a recording's word
    if case is not None and case["properties"].get("kernel.weight_only") == "True":
        text += " weight-only"
    return text + (f" {case['verdict']} !" if case is not None and not case["expected"] else "")


def _skipped(reporter: Any, records: Records) -> None:
    """Cells that were not measured, by reason, most cells first."""
    cells: dict[str, set[str]] = {}
    for nodeid, reason in records.skipped:
        if "[" in nodeid and not reason.startswith(DECLARED):  # those stand in the table, by test_hardware
            case = nodeid.rpartition("[")[2].removesuffix("]")
            cells.setdefault(reason, set()).add(case.removesuffix("-decode").removesuffix("-prefill"))
    if not cells:
        return
    reporter.write_sep("=", "quantdet: not measured")
    counts = Counter({reason: len(group) for reason, group in cells.items()})
    for reason, count in counts.most_common():
        reporter.write_line(f"{count:4d} {'cell ' if count == 1 else 'cells'}  {reason}")
