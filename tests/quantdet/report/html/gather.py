"""From the controller's records to the data of a page: the run, links to the evidence, commands, what is not covered."""

import datetime
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from quantdet.report import entries, junit, rerun
from quantdet.report.html.data import SCHEMA, Case, Data, ordered
from quantdet.report.record import RECORDS
from quantdet.session.coverage import _machine, coverage
from quantdet.session.session import SESSION

# Suite properties that the page makes itself from the cases, or shows in another way.
_APART = ("effects.", "snr.", "identification", "env.", "unexpected", "hardware", "replay")


def gather(config: pytest.Config, folder: Path) -> Data:
    """What a page in `folder` is rendered from."""
    session, records = config.stash[SESSION], config.stash[RECORDS]
    matrix = session.matrix
    order = {"model": list(matrix.models), "format": list(matrix.formats), "hardware": list(matrix.hardware)}
    roots = (session.replay.folders if session.replay is not None else ()) or (session.options.store,)
    root = config.rootpath.resolve()
    cases = []
    known = ordered(records.cases, order)
    commands = {case["nodeid"]: rerun.entry(config, found) for found in entries.of(known) for case in found.cases}
    for case in known:
        properties = {name: value for name, value in case["properties"].items() if not name.startswith("pair.")}
        evidence = dict(case.get("evidence") or {})
        row: Case = {**case, "message": _inside(case["message"], root), "properties": properties, "evidence": evidence}
        row["link"] = _link(properties.get("observation", ""), roots, folder)
        row["detail"] = "" if case["expected"] else _inside(case["detail"], root)
        row["cause"] = case["cause"] and {name: _inside(text, root) for name, text in case["cause"].items()}
        row["command"] = commands.get(case["nodeid"], "")  # of the whole entry
        cases.append(row)
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cut": records.cut,
        "mode": "live" if session.replay is None else "replay",
        "replay": [_relative(path, root) for path in roots] if session.replay is not None else [],
        "machine": _machine(session),
        "asked": session.options.hardware or "",
        "suite": {name: _inside(text, root) for name, text in junit.properties(config) if not name.startswith(_APART)},
        "junit": _junit(config, folder),
        "titles": {
            "model": {name: row.title for name, row in matrix.models.items()},
            "format": {name: row.title for name, row in matrix.formats.items()},
            "hardware": {name: row.title for name, row in matrix.hardware.items()},
        },
        "environments": _environments(cases),
        "coverage": [{name: _inside(text, root) for name, text in row.items()} for row in coverage(matrix, session, records)],
    }
    skipped = [{"nodeid": nodeid, "reason": _inside(reason, root)} for nodeid, reason in sorted(records.skipped)]
    broken = [
        {"nodeid": nodeid, "text": _inside(text, root), "command": rerun.command(config, nodeid)}
        for nodeid, text in sorted(records.broken)
    ]
    return Data(run, cases, skipped, broken)


def _environments(cases: list[Case]) -> list[dict[str, Any]]:
    """The environment of every place, taken out of the cases; facts that differ between its cells are a list."""
    found: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for case in cases:
        environment = case["evidence"].pop("environment", None)
        if environment is None:
            continue
        facts = found.setdefault((case["properties"]["case.hardware"], case["evidence"]["vllm"]), {})
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


def _junit(config: pytest.Config, folder: Path) -> str:
    given = config.getoption("xmlpath", None)
    if not given:
        return ""
    path = Path(config.invocation_params.dir, os.path.expanduser(os.path.expandvars(given)))
    return _address(path.resolve(), folder)


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
