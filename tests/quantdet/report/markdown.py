"""The summary as Markdown, appended to the file that GitHub Actions shows on a job's page ($GITHUB_STEP_SUMMARY).

Format: https://docs.github.com/actions/reference/workflow-commands-for-github-actions#adding-a-job-summary
"""

import os
from pathlib import Path
from typing import Any

import pytest

from quantdet.report import activations, confidence, junit
from quantdet.report.record import RECORDS, Records
from quantdet.report.tables import place
from quantdet.untrusted import in_markdown

VARIABLE = "GITHUB_STEP_SUMMARY"
_TABLED = ("test_repeat", "test_distinct", "test_kernel", "test_hardware", "test_activations")
_FAILED = pytest.StashKey[str]()
_MOST_BYTES = 900_000  # GitHub refuses a summary of more than 1 MiB


def append(session: pytest.Session) -> None:
    """On the controller, where the variable names a file that can be written; a summary is never what fails a run."""
    path = os.environ.get(VARIABLE)
    if not path or hasattr(session.config, "workerinput"):
        return
    found = dict(junit.properties(session.config))
    text = summary(session.config.stash[RECORDS], found["summary"], found["vllm.newer"])
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text[:_MOST_BYTES] + "\n")
    except OSError as error:
        session.config.stash[_FAILED] = f"no job summary: ${VARIABLE}: {error}"


def announce(reporter: Any, config: pytest.Config) -> None:
    """Say that it was not written."""
    text = config.stash.get(_FAILED, "")
    if text:
        reporter.write_line(text)


def summary(records: Records, first: str, newer: str = "") -> str:
    """Summary line, controls, what is unexpected, a table of verdicts for each model and hardware, answers to questions."""
    lines = ["## quantdet", "", *([f"**{in_markdown(newer)}**", ""] if newer else []), in_markdown(first), ""]
    lines += [
        f"- controls on {in_markdown(where)}: {in_markdown(text)}" for where, text in confidence.controls(records.cases).items()
    ]
    lines += [
        f"- {in_markdown(text)}" for text in (confidence.at_once(records.cases), confidence.multiplicity(records.cases)) if text
    ]
    unexpected = [case for case in records.cases if not case["expected"]]
    if unexpected:
        lines += ["", "### Unexpected", "", *(f"- {in_markdown(case['message'])}" for case in unexpected[:50])]
    if len(unexpected) > 50:
        lines.append(f"- and {len(unexpected) - 50} more")
    places: dict[str, dict[str, dict[str, Any]]] = {}
    for case in records.cases:
        properties = case["properties"]
        if "case.format" in properties and case["test"] in _TABLED:
            phase, name = properties["case.phase"], case["test"].removeprefix("test_")
            column = {"repeat": phase, "activations": f"activations {phase}"}.get(name, name)
            places.setdefault(place(properties), {}).setdefault(properties["case.format"], {})[column] = case
    for where, formats in places.items():
        hidden = any(map(activations.cases_of, formats.values()))
        columns = ["format", "decode", "prefill", "distinct", *(["hidden states"] if hidden else []), "kernel", "n"]
        lines += ["", f"### {in_markdown(where)}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, cases in formats.items():
            words = [_word(cases.get(column) or cases.get("hardware")) for column in ("decode", "prefill", "distinct")]
            words += [_word(activations.deciding(cases))] if hidden else []
            logits = activations.others(cases)
            some = (logits or activations.cases_of(cases))[0]["properties"]
            ran = cases["kernel"]["properties"] if "kernel" in cases else some
            executed = f"{_word(cases.get('kernel'))} {in_markdown(ran.get('kernel.executed', ''))}".strip()
            n = in_markdown(some.get("runs", "")) if logits and some.get("flip_rate_upper95") else ""
            lines.append(f"| {in_markdown(name)} | {' | '.join(words)} | {executed} | {n} |")
    return "\n".join(lines + _questions(records))


def _questions(records: Records) -> list[str]:
    """Each question once, below it the answers."""
    asked: dict[str, list[str]] = {}
    for case in records.cases:
        if case["test"] == "test_question":
            text = case["properties"].get("asks", "") or case["properties"]["case.format"]
            answer = case["message"].removeprefix(case["verdict"])
            asked.setdefault(text, []).append(f"  - {_word(case)} {in_markdown(answer)}")
    lines = ["", "### Published questions", ""] if asked else []
    for text, answers in asked.items():
        lines += [f"- {in_markdown(text)}", *answers]
    return lines


def _word(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    return f"{case['verdict']}" if case["expected"] else f"**{case['verdict']} !**"
