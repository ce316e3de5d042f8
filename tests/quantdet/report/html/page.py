"""The page: a Jinja2 template over plain data. No script, no other file, everything that was measured or said escaped."""

import base64
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from quantdet.report import confidence, entries, printed, speed
from quantdet.report.case import Case
from quantdet.report.html import coverage, distances, questions, reexecutions, svg, verdicts
from quantdet.report.html.data import CASES, Data

_TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
# No network, no script: the style by its hash, an empty icon so that none is asked for.
_POLICY = "default-src 'none'; style-src 'sha256-{style}'; img-src data:; base-uri 'none'; form-action 'none'"


def text(data: Data) -> str:
    """The page as HTML; the same data give the same text."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    policy = _POLICY.format(style=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode())
    return environment.get_template("report.html.j2").render(view(data), style=style, policy=policy)


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))


def view(data: Data) -> dict[str, Any]:
    """What the template shows."""
    run, cases = data.run, data.cases
    order = list(run["titles"]["format"])
    heat, scale = distances.heat(cases, order)
    covered, reasons = coverage.covered(run["coverage"])
    unexpected = entries.of(cases)
    found: dict[str, Any] = {
        "run": run, "titles": run["titles"], "facts": facts(data), "tiles": tiles(data), "unexpected": unexpected,
        "unexpected_said": entries.said(unexpected),
        "cut": run.get("cut", ""), "broken": data.broken, "skipped": skips(data), "counted": confidence.counted(cases),
        "controls_said": confidence.controls(cases), "tables": verdicts.tables(cases), "controls": verdicts.controls(cases),
        "kernels": verdicts.kernels(cases), "noisy": verdicts.noisy(cases), "heat": heat, "scale": scale, "steps": svg.STEPS,
        "equal": distances.equal(cases), "drift": distances.drift(cases), "questions": questions.answered(cases),
        "reexecutions": reexecutions.verified(cases, order), "covered": covered, "reasons": reasons,
        "symbols": used(cases), "data_file": CASES, "speed_note": speed.NOTE,
        "steps_note": printed.STEPS_NOTE, "tokens_note": printed.TOKENS_NOTE,
    }  # fmt: skip
    return {**found, "sections": sections(found)}


def facts(data: Data) -> list[tuple[str, str]]:
    """What was run."""
    run = data.run
    here, nothing = run["machine"], ""
    if run["mode"] == "replay":  # this machine only judges: what it is would be taken for what was measured
        here = dict.fromkeys(here, "")
        nothing = "; ".join(["no observation", *([f"asked for {run['asked']}"] if run.get("asked") else [])])
    places = [(one["hardware"], one["vllm"], one["facts"]) for one in run["environments"]]
    hardware = list(dict.fromkeys(where for where, _, _ in places))
    named = [f"{where} ({run['titles']['hardware'].get(where, '')})".replace(" ()", "") for where in hardware]

    def several(name: str) -> str:
        return ", ".join(dict.fromkeys(value for _, _, one in places for value in one.get(name, []) if value))

    # Of every place its GPU, or its CPU where it has none: a replay may hold both kinds.
    found = (value for _, _, one in places for value in list(filter(None, one.get("gpu", []))) or one.get("cpu", []) if value)
    devices = ", ".join(dict.fromkeys(found)) or here["gpu"] or here["cpu"]
    mode = "live, on this machine" if run["mode"] == "live" else f"replay of {', '.join(run['replay'])}"
    suite = run["suite"]
    return [
        (name, text) for name, text in (
            ("Newer than measured", suite.get("vllm.newer", "")),
            ("Hardware", ", ".join(named) or here["hardware"] or nothing), ("Device", devices),
            ("vLLM", several("vllm") or here["vllm"]), ("torch", several("torch_package") or here["torch"]),
            ("Run", mode), ("Date", run["date"]),
            ("Suite", " ".join(filter(None, (suite.get("suite.version", ""), suite.get("suite.revision", ""))))),
            ("Seeded defect", suite.get("suite.injected", "")),
        ) if text
    ]  # fmt: skip


def tiles(data: Data) -> list[tuple[str, str, str]]:
    """`(number, what, kind)`: the summary line in figures."""
    wrong = sum(not case.expected for case in data.cases) + len(data.broken)
    counts = Counter(case.verdict for case in data.cases)
    made = [
        (str(wrong), "unexpected", "bad" if wrong else "" if data.run.get("cut") else "good"),
        (str(len(data.cases)), "cases judged", ""),
    ]
    made += [(str(count), word, "") for word, count in sorted(counts.items(), key=lambda row: (-row[1], row[0]))]
    return [*made, (str(len(data.skipped)), "skipped", "")]


def skips(data: Data) -> list[tuple[int, str]]:
    """Reasons of skipped cases, most cases first."""
    counts = Counter(row["reason"] for row in data.skipped)
    return [(count, reason) for reason, count in sorted(counts.items(), key=lambda row: (-row[1], row[0]))]


def used(cases: list[Case]) -> list[tuple[str, str]]:
    """Symbols and words of this page, in the order of the suite's list."""
    words = {str(case.verdict) for case in cases}
    return [(verdicts.SYMBOLS[word], word) for word in verdicts.SYMBOLS if word in words]


def sections(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`(anchor, name)` of the sections that this page has."""
    names = (
        ("matrix", "Verdicts", "tables"), ("questions", "Published questions", "questions"),
        ("machines", "Machines and versions", "equal"),
        ("machines", "Machines and versions", "drift"), ("distances", "Distances", "heat"),
        ("reexecutions", "Re-executions", "reexecutions"), ("kernels", "Kernels", "kernels"),
        ("noise", "Noise", "noisy"), ("environment", "Environment", "run"), ("coverage", "Coverage", "covered"),
    )  # fmt: skip
    return list(dict.fromkeys((anchor, name) for anchor, name, key in names if found[key]))
