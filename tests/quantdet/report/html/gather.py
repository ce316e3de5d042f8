"""From the controller's records to the data of a page: the run, links to the evidence, commands, what is not covered."""

import datetime
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantdet.report import entries, junit_suite, rerun
from quantdet.report.case import Case, SharedCause
from quantdet.report.html.data import SCHEMA, Data, ordered
from quantdet.report.record import Records
from quantdet.report.run import Run

# Suite properties that the page makes itself from the cases, or shows in another way.
_APART = ("effects.", "snr.", "identification", "env.", "unexpected", "hardware", "replay")


def gather(run: Run, records: Records, folder: Path) -> Data:
    """What a page in `folder` is rendered from."""
    order = {"model": list(run.models), "format": list(run.formats), "hardware": list(run.hardware)}
    root = run.root.resolve()
    cases = []
    known = ordered(records.cases, order)
    commands = {case.nodeid: rerun.entry(run, found) for found in entries.of(known) for case in found.cases}
    for case in known:
        cause = case.cause
        shown = replace(
            case,
            message=_inside(case.message, root),
            detail="" if case.expected else _inside(case.detail, root),
            cause=cause and SharedCause(*(_inside(text, root) for text in (cause.cell, cause.first, cause.detail))),
            evidence={name: value for name, value in case.evidence.items() if name != "environment"},
            link=_link(case.text("observation"), run.evidence, folder),
            command=commands.get(case.nodeid, ""),  # of the whole entry
        )
        cases.append(shown)
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cut": records.cut,
        "mode": "replay" if run.replay else "live",
        "replay": [_relative(path, root) for path in run.replay],
        "machine": dict(run.machine),
        "asked": run.asked,
        "suite": {
            name: _inside(text, root) for name, text in junit_suite.properties(run, records) if not name.startswith(_APART)
        },
        "junit": "" if run.junit is None else _address(run.junit, folder),
        "titles": {"model": dict(run.models), "format": dict(run.formats), "hardware": dict(run.hardware)},
        "environments": _environments(known),
        "coverage": [{name: _inside(text, root) for name, text in row.items()} for row in run.coverage],
    }
    skipped = [{"nodeid": nodeid, "reason": _inside(reason, root)} for nodeid, reason in sorted(records.skipped)]
    broken = [
        {"nodeid": nodeid, "text": _inside(text, root), "command": rerun.command(run, nodeid)}
        for nodeid, text in sorted(records.broken)
    ]
    return Data(about, cases, skipped, broken)


def _environments(cases: list[Case]) -> list[dict[str, Any]]:
    """The environment of every place, which no case says again; facts that differ between its cells are a list."""
    found: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for case in cases:
        if "environment" not in case.evidence:
            continue
        environment = dict(case.evidence["environment"])
        facts = found.setdefault((case.hardware, case.evidence["vllm"]), {})
        variables = environment.pop("variables", None)
        if isinstance(variables, dict):
            environment |= {f"variable {name}": value for name, value in variables.items()}
        for name, value in environment.items():
            known = facts.setdefault(name, [])
            if value not in known:
                known.append(value)
    return [
        {"hardware": hardware, "vllm": vllm, "facts": {name: sorted(map(str, facts[name])) for name in sorted(facts)}}
        for (hardware, vllm), facts in found.items()
    ]


def _link(observation: str, roots: Iterable[Path], folder: Path) -> str:
    """Where an observation lies, from `folder`; empty if it is not there."""
    for root in roots:
        if observation and (root / observation).is_dir():
            return _address(root / observation, folder)
    return ""


def _address(path: Path, folder: Path) -> str:
    """`path` as a link of a page in `folder`: a `#` or `%` of a name is no part of the address's syntax."""
    return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))


def _relative(path: Path, root: Path) -> str:
    """A folder as somebody would write it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _inside(text: str, root: Path) -> str:
    """A text whose paths below `root` begin there: where a machine keeps its files is nobody's business on a page."""
    if root == Path(root.anchor):
        return text
    below = re.sub(rf"(?<![\w./-]){re.escape(str(root))}/(?=[^\s,:;])", "", text)
    return re.sub(rf"(?<![\w./-]){re.escape(str(root))}(?=$|[\s,:;)'\"])", ".", below)
