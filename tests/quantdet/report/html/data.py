"""`cases.jsonl`: all that the page shows, one JSON object a line, so that it can be rendered again.

The first line is the run (`"kind": "run"`), then every case (`"kind": "case"`, in an order that does not depend on who
finished first), then what was skipped and what broke down. Numbers that JSON does not have are words ("inf").
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdet.report.case import Case
from quantdet.report.record import place_of
from quantdet.untrusted import plain

CASES = "cases.jsonl"
SCHEMA = 2  # of 1, figures were texts


class DataError(ValueError):
    """A file that is no `cases.jsonl` of this version; names file and line."""


@dataclass(frozen=True)
class Data:
    """What a page is rendered from."""

    run: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        cases = (case.to_json() for case in self.cases)
        kinds = (("run", [self.run]), ("case", cases), ("skipped", self.skipped), ("broken", self.broken))
        for kind, rows in kinds:
            for row in rows:
                yield json.dumps(_writable({"kind": kind, **row}), separators=(",", ":"), ensure_ascii=True)


def ordered(cases: Iterable[Case], order: dict[str, list[str]]) -> list[Case]:
    """By model, hardware, version, format (in the matrix's order) and test."""

    def rank(name: str, value: str) -> tuple[int, str]:
        known = order.get(name, [])
        return (known.index(value) if value in known else len(known), value)

    def key(case: Case) -> tuple[Any, ...]:
        return (
            rank("model", case.model),
            rank("hardware", case.hardware),
            case.vllm,
            rank("format", case.format),
            place_of(case.test),
            case.test,
            case.nodeid,
        )

    return sorted(cases, key=key)


def write(data: Data, folder: Path) -> Path:
    """Write the file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    place, unfinished = folder / CASES, folder / f".{CASES}"
    unfinished.write_text("".join(f"{line}\n" for line in data.lines()), encoding="utf-8")
    os.replace(unfinished, place)
    return place


def read(path: Path) -> Data:
    """What `write` wrote.

    Raises:
        DataError: not such a file.
    """
    rows: dict[str, list[dict[str, Any]]] = {"run": [], "case": [], "skipped": [], "broken": []}
    numbers: list[int] = []  # of the lines of cases
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                kind = row.pop("kind")
                rows[kind].append(_readable(row))
                numbers += [number] if kind == "case" else []
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{path}: line {number}: no line of a {CASES}") from None
    if len(rows["run"]) != 1 or rows["run"][0].get("schema") != SCHEMA:
        raise DataError(f"{path}: needs one run of schema {SCHEMA}")
    cases = []
    for number, row in zip(numbers, rows["case"], strict=True):
        try:
            cases.append(Case.from_json(row))
        except ValueError:
            raise DataError(f"{path}: line {number}: no case of schema {SCHEMA}") from None
    return Data(rows["run"][0], cases, rows["skipped"], rows["broken"])


_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain(name): _writable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return plain(value, "\n") if isinstance(value, str) else value


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return _WORDS[value["float"]]
        return {name: _readable(one) for name, one in value.items()}
    return [_readable(one) for one in value] if isinstance(value, list) else value
