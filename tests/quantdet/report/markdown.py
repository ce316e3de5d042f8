"""The summary as Markdown, appended to the file that GitHub Actions shows on a job's page ($GITHUB_STEP_SUMMARY).

Format: https://docs.github.com/actions/reference/workflow-commands-for-github-actions#adding-a-job-summary
"""

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantdet.report import confidence, entries, hidden_states, junit_suite, rerun
from quantdet.report.case import Case, Place
from quantdet.report.entries import Entry
from quantdet.report.record import RECORDS, Records
from quantdet.report.run import RUN
from quantdet.untrusted import in_markdown

VARIABLE = "GITHUB_STEP_SUMMARY"
_TABLED = ("test_repeat", "test_distinct", "test_kernel", "test_refusal", "test_hidden_states")
_FAILED = pytest.StashKey[str]()
_MOST_ENTRIES = 50
_MOST_BYTES = 900_000  # GitHub refuses a summary of more than 1 MiB


def append(session: pytest.Session) -> None:
    """On the controller, where the variable names a file that can be written; a summary is never what fails a run."""
    path = os.environ.get(VARIABLE)
    if not path or hasattr(session.config, "workerinput"):
        return
    run, records = session.config.stash[RUN], session.config.stash[RECORDS]
    text = summary(records, junit_suite.summary(records), lambda one: rerun.entry(run, one), newer=run.newer)
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


def summary(records: Records, first: str, command: Callable[[Entry], str] = lambda _: "", newer: str = "") -> str:
    """Summary line, controls, what is unexpected, a table of verdicts for each model and hardware, answers to questions.

    `command`: what runs an entry again. `newer`: what to say first of a vLLM that is newer than what was measured.
    """
    lines = ["## quantdet", "", *([f"**{in_markdown(newer)}**", ""] if newer else []), in_markdown(first), ""]
    lines += [
        f"- controls on {in_markdown(where)}: {in_markdown(text)}" for where, text in confidence.controls(records.cases).items()
    ]
    lines += [
        f"- {in_markdown(text)}" for text in (confidence.at_once(records.cases), confidence.multiplicity(records.cases)) if text
    ]
    unexpected = entries.of(records.cases)
    if unexpected:
        lines += ["", f"### Unexpected: {entries.said(unexpected)}", ""]
        lines += [line for one in unexpected[:_MOST_ENTRIES] for line in _entry(one, command(one))]
    if len(unexpected) > _MOST_ENTRIES:
        lines.append(f"- and {len(unexpected) - _MOST_ENTRIES} more")
    places: dict[Place, dict[str, dict[str, Case]]] = {}
    for case in records.cases:
        if case.format and case.test in _TABLED:
            name = case.test.removeprefix("test_")
            column = {"repeat": case.phase, "hidden_states": f"hidden_states {case.phase}"}.get(name, name)
            places.setdefault(case.place, {}).setdefault(case.format, {})[column] = case
    for where, formats in places.items():
        hidden = any(map(hidden_states.cases_of, formats.values()))
        columns = ["format", "decode", "prefill", "kernel", "distinct", *(["hidden states"] if hidden else []), "n"]
        lines += ["", f"### {in_markdown(str(where))}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, cases in formats.items():
            words = {name: _word(cases.get(name) or cases.get("refusal")) for name in ("decode", "prefill", "distinct")}
            logits = hidden_states.others(cases)
            some = (logits or hidden_states.cases_of(cases))[0]
            executed = f"{_word(cases.get('kernel'))} {in_markdown(cases.get('kernel', some).executed)}".strip()
            n = str(some.runs) if logits and some.runs is not None and some.flip_rate is not None else ""
            texts = [in_markdown(name), words["decode"], words["prefill"], executed, words["distinct"]]
            texts += [_word(hidden_states.deciding(cases)), n] if hidden else [n]
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines + _questions(records))


def _entry(one: Entry, command: str) -> list[str]:
    """First line, the cases that it took, its log folded away, the command: all of it shown, nothing obeyed."""
    lines = [f"- {in_markdown(one.first)}", f"  <br>{in_markdown(one.took)}"]
    if one.lines:  # HTML up to the end of `pre`: no Markdown is looked for in it
        said = html.escape("\n".join(one.lines)).replace("\n", "\n  ")
        lines += ["", f"  <details><summary>more</summary><pre>{said}</pre></details>", ""]
    return [*lines, f"  <br><code>{in_markdown(command)}</code>"] if command else lines


def _questions(records: Records) -> list[str]:
    """Each question once, below it the answers."""
    asked: dict[str, list[str]] = {}
    for case in records.cases:
        if case.test == "test_question":
            text = case.text("asks") or case.format
            answer = f" {case.where}: {case.why}"
            asked.setdefault(text, []).append(f"  - {_word(case)} {in_markdown(answer)}")
    lines = ["", "### Published questions", ""] if asked else []
    for text, answers in asked.items():
        lines += [f"- {in_markdown(text)}", *answers]
    return lines


def _word(case: Case | None) -> str:
    if case is None:
        return ""
    return f"{case.verdict}" if case.expected else f"**{case.verdict} !**"
