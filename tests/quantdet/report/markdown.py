"""The summary as Markdown, appended to the file that GitHub Actions shows on a job's page ($GITHUB_STEP_SUMMARY).

Format: https://docs.github.com/actions/reference/workflow-commands-for-github-actions#adding-a-job-summary
"""

import os
from pathlib import Path
from typing import Any

import pytest

from quantdet.report import confidence, junit
from quantdet.report.record import RECORDS, Records
from quantdet.report.tables import place

VARIABLE = "GITHUB_STEP_SUMMARY"
_MOST_BYTES = 900_000  # GitHub refuses a summary of more than 1 MiB


def append(session: pytest.Session) -> None:
    """On the controller, where the variable names a file that can be written; a summary is never what fails a run."""
    path = os.environ.get(VARIABLE)
    if not path or hasattr(session.config, "workerinput"):
        return
    found = dict(junit.properties(session.config))
    text = summary(session.config.stash[RECORDS], found["summary"])
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text[:_MOST_BYTES] + "\n")
    except OSError as error:
        session.config.get_terminal_writer().line(f"no job summary: ${VARIABLE}: {error}")


def summary(records: Records, first: str) -> str:
    """Summary line, controls, what is unexpected, and a table of verdicts for each model and hardware."""
    lines = ["## quantdet", "", _plain(first), ""]
    lines += [f"- controls on {_plain(where)}: {_plain(text)}" for where, text in confidence.controls(records.cases).items()]
    lines += [
        f"- {_plain(text)}" for text in (confidence.at_once(records.cases), confidence.multiplicity(records.cases)) if text
    ]
    unexpected = [case for case in records.cases if not case["expected"]]
    if unexpected:
        lines += ["", "### Unexpected", "", *(f"- {_plain(case['message'])}" for case in unexpected[:50])]
    if len(unexpected) > 50:
        lines.append(f"- and {len(unexpected) - 50} more")
    places: dict[str, dict[str, dict[str, Any]]] = {}
    for case in records.cases:
        properties = case["properties"]
        if "case.format" in properties and case["test"] in ("test_repeat", "test_distinct", "test_kernel", "test_hardware"):
            column = properties["case.phase"] if case["test"] == "test_repeat" else case["test"].removeprefix("test_")
            places.setdefault(place(properties), {}).setdefault(properties["case.format"], {})[column] = case
    for where, formats in places.items():
        lines += [
            "",
            f"### {_plain(where)}",
            "",
            "| format | decode | prefill | distinct | kernel | n |",
            "|---|---|---|---|---|---|",
        ]
        for name, cases in formats.items():
            words = [_word(cases.get(column) or cases.get("hardware")) for column in ("decode", "prefill", "distinct")]
            some = next(iter(cases.values()))["properties"]
            executed = f"{_word(cases.get('kernel'))} {_plain(some.get('kernel.executed', ''))}".strip()
            lines.append(f"| {_plain(name)} | {' | '.join(words)} | {executed} | {_plain(some.get('runs', ''))} |")
    return "\n".join(lines)


def _word(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    return f"{case['verdict']}" if case["expected"] else f"**{case['verdict']} !**"


def _plain(text: str) -> str:
    """Text from a recording or an engine, with nothing that Markdown or HTML would obey."""
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, f"\\{character}" if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character])
    return " ".join(text.split())
