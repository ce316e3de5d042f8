"""The matrix of verdicts and what stands around it: tags, one table per model, controls, kernels that ran, noisy cells."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from quantdet.report import hidden_states, speed
from quantdet.report.case import Case, Place
from quantdet.report.html import svg
from quantdet.report.junit_text import rate
from quantdet.report.junit_text import text as figure_text

SYMBOLS = {
    "BIT_EXACT": "=", "NOISY": "~", "CONFIRMED": "\N{CHECK MARK}", "DISTINCT": "\N{NOT EQUAL TO}",
    "IDENTICAL": "\N{IDENTICAL TO}", "INDISTINCT": "\N{ALMOST EQUAL TO}", "DETECTABLE": "\N{NOT EQUAL TO}",
    "NOT_DETECTABLE": "\N{ALMOST EQUAL TO}", "UNDERPOWERED": "?", "UNSUPPORTED": "\N{EN DASH}", "UNAVAILABLE": "\N{MIDDLE DOT}",
    "INVALID": "\N{MULTIPLICATION SIGN}", "ERROR": "\N{MULTIPLICATION SIGN}", "TIMEOUT": "\N{MULTIPLICATION SIGN}",
}  # fmt: skip
_GOOD = ("BIT_EXACT", "CONFIRMED", "DISTINCT", "DETECTABLE")
_NONE = ("UNSUPPORTED", "UNAVAILABLE")
_CELL_TESTS = ("test_repeat", "test_restart", "test_distinct", "test_kernel", "test_refusal", "test_hidden_states")
_APART = ("test_versions", "test_reexecution", "test_question")
LAYERS = "hidden states"  # the column of test_hidden_states, both phases
_DROPPED = ("LinearKernel", "LinearMethod", "ScaledMMKernel", "ScaledMM")  # no news, much room


@dataclass(frozen=True)
class Tag:
    """A verdict as a reader sees it; never by colour alone."""

    word: str
    message: str = ""
    expected: bool = True
    note: str = ""
    same: bool = False  # whether what is the same is what was hoped for

    @property
    def symbol(self) -> str:
        return SYMBOLS.get(self.word, "")

    @property
    def kind(self) -> str:
        if not self.expected:
            return "bad"
        return (
            "good"
            if self.word in _GOOD or (self.same and self.word == "IDENTICAL")
            else "none"
            if self.word in _NONE
            else "note"
        )


def tag(case: Case | None) -> Tag | None:
    if case is None:
        return None
    note = "weight-only" if case.weight_only else ""
    return Tag(case.verdict, case.message, case.expected, note, case.test != "test_distinct")


@dataclass(frozen=True)
class Column:
    """Where: a hardware row, and the vLLM version where a run has several of it."""

    hardware: str
    vllm: str

    def __str__(self) -> str:
        return f"{self.hardware}, vLLM {self.vllm}" if self.vllm else self.hardware


def place(case: Case) -> Column:
    return Column(case.hardware, case.vllm)


@dataclass(frozen=True)
class Entry:
    """One cell of the matrix: its verdicts by column, and the figures behind them."""

    tags: dict[str, Tag]
    kernel: str = ""
    speed: str = ""  # decode, tokens per second, with its ratio
    figures: list[tuple[str, str]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    sample: str = ""  # n and bound in short, for paper, where no figures open


@dataclass(frozen=True)
class Table:
    """The matrix of one model; the column `kernel`, which every one has, holds what ran and opens the evidence."""

    model: str
    places: list[Column]
    columns: list[str]
    rows: list[tuple[str, list[Entry | None]]]

    @property
    def timed(self) -> bool:
        """Whether some cell has a figure of its speed: then all have a column for it."""
        return any(entry is not None and entry.speed for _, entries in self.rows for entry in entries)

    @property
    def span(self) -> int:
        """Columns of one place."""
        return len(self.columns) + self.timed


def tables(cases: Sequence[Case]) -> list[Table]:
    """One per model; rows are formats, groups of columns are places."""
    models: dict[str, list[Case]] = {}
    for case in cases:
        if case.test in _CELL_TESTS:
            models.setdefault(case.model, []).append(case)
    made = []
    for model, group in models.items():
        cells: dict[tuple[str, Column], dict[str, Case]] = {}
        for case in group:
            name = case.test.removeprefix("test_")
            name = {"repeat": case.phase, "hidden_states": f"hidden_states {case.phase}"}.get(name, name)
            cells.setdefault((case.format, place(case)), {})[name] = case
        places = list(dict.fromkeys(where for _, where in cells))
        formats = list(dict.fromkeys(format_ for format_, _ in cells))
        names = ("decode", "prefill", "kernel", "distinct", "restart")
        columns = [name for name in names if name == "kernel" or any(name in c for c in cells.values())]
        columns += [LAYERS] if any(map(hidden_states.cases_of, cells.values())) else []
        paces = speed.paces(group)
        rows = [(one, [_entry(cells.get((one, where)), paces) for where in places]) for one in formats]
        made.append(Table(model, places, columns, rows))
    return made


def _entry(cases: dict[str, Case] | None, paces: dict[Place, dict[str, speed.Pace]]) -> Entry | None:
    if cases is None:
        return None
    tags = {name: found for name, case in cases.items() if (found := tag(case)) is not None}
    if (layers := tag(hidden_states.deciding(cases))) is not None:
        tags[LAYERS] = layers
    hidden, logits = hidden_states.cases_of(cases), hidden_states.others(cases)
    some = cases.get("decode") or cases.get("prefill") or (logits or hidden)[0]
    some = some if logits else some.without("runs", "flip_rate_upper95", "first_divergence")
    judged = [cases["kernel"]] if "kernel" in cases else []  # of several lifetimes it names the one that it is about
    executed = next(filter(None, (case.executed for case in (*judged, *cases.values()))), "")
    bound = "" if some.flip_rate is None else f"{some.flip_rate:.3g}"
    runs = str(some.runs) if bound and some.runs is not None else ""
    pace = paces.get(some.place, {}).get(some.format)
    expected = dict.fromkeys(filter(None, (case.expectation for case in cases.values())))
    distinct = cases.get("distinct", some)
    figures = [
        ("requested", next(filter(None, (one.requested for one in cases.values())), "")),
        ("executed", executed),
        ("repeats n", runs),
        ("flip rate below", f"{bound} per call, at 95 %" if bound else ""),
        *_speeds(pace),
        ("tokens per second, all captured", figure_text("tokens_per_second", some.number("tokens_per_second"))),
        ("control", some.text("control")),
        ("same numerics as", ",".join(distinct.names("identical_to"))),
        ("closest format", distinct.text("closest")),
        ("first divergence", some.text("first_divergence")),
        ("first divergent layer", _first(cases, "first_divergent_layer")),
        *((f"hidden states, {case.phase}", case.message) for case in hidden),
        ("expectation", " | ".join(expected)),
    ]  # fmt: skip
    bundle, link = _first(cases, "bundle"), next(filter(None, (one.link for one in cases.values())), "")
    links = [(text, target) for text, target in (("observation", link), ("bug bundle", bundle)) if target]
    decode = "" if pace is None else rate(pace.decode)
    if pace is not None and pace.decode_ratio is not None:
        decode += f" (\N{MULTIPLICATION SIGN}{speed.times(pace.decode_ratio)})"
    parts = (("n", runs), ("flips <", bound))
    sample = ", ".join(f"{name} {text}" for name, text in parts if text)
    return Entry(tags, short(executed), decode, [(name, text) for name, text in figures if text], links, sample)


def _speeds(pace: speed.Pace | None) -> list[tuple[str, str]]:
    if pace is None:
        return []
    rows = (("decode", pace.decode, pace.decode_ratio), ("prefill", pace.prefill, pace.prefill_ratio))
    n = figure_text("tokens_per_second.n", pace.n)
    found = []
    for phase, value, ratio in rows:
        beside = f", {speed.times(ratio)} of that of {pace.baseline}" if ratio is not None else ""
        found += [(f"{phase} tokens per second", f"{rate(value)}{beside} ({n})")] if value is not None else []
    return found


def _first(cases: dict[str, Case], name: str) -> str:
    return next(filter(None, (case.text(name) for case in cases.values())), "")


def short(executed: str) -> str:
    """A kernel's name without the endings that all have."""
    for ending in _DROPPED:
        executed = executed.replace(ending, "")
    return executed


def controls(cases: Sequence[Case]) -> list[tuple[str, str, Tag, str]]:
    """`(what, cell, verdict, message)` of seeded defects and of what has to be the same."""
    found = []
    for case in cases:
        known = tag(case)
        if case.test not in _CELL_TESTS + _APART and known is not None:
            cell = f"{case.model}/{case.format} on {place(case)}"
            found.append((case.test.removeprefix("test_").replace("_", " "), cell, known, case.message))
    return found


@dataclass(frozen=True)
class Kernels:
    """Which kernels ran in which layers, of one model at one place."""

    model: str
    where: Column
    rows: list[tuple[str, str, Tag, list[tuple[str, str]], str, str]]


def kernels(cases: Sequence[Case]) -> list[Kernels]:
    """Format, requested, verdict, `(executed, layers)`, attention and mode."""
    found: dict[tuple[str, Column], Kernels] = {}
    for case in cases:
        known = tag(case)
        if case.test != "test_kernel" or not case.evidence.get("layers") or known is None:
            continue
        where = place(case)
        executed: dict[str, Counter[str]] = {}
        for kind, module, name, count in case.evidence["layers"]:
            if kind in ("linear", "moe"):
                executed.setdefault(str(name), Counter())[str(module)] += int(count)
        parts = [
            (name, ", ".join(f"{module} \N{MULTIPLICATION SIGN}{count}" for module, count in modules.items()))
            for name, modules in executed.items()
        ]
        row = (case.format, case.requested, known, parts,
               ", ".join(case.evidence.get("attention", ())), case.evidence.get("mode", ""))  # fmt: skip
        found.setdefault((case.model, where), Kernels(case.model, where, [])).rows.append(row)
    return list(found.values())


@dataclass(frozen=True)
class Noisy:
    """A cell whose runs differ, with a grid for each prompt that shows it."""

    cell: str
    what: str
    tag: Tag
    layer: str
    bundle: str
    grids: list[tuple[str, Markup]]


def noisy(cases: Sequence[Case]) -> list[Noisy]:
    found = []
    for number, case in enumerate(cases):
        known = tag(case)
        seen: list[dict[str, Any]] = case.evidence.get("noise") or []
        if not seen or known is None:
            continue
        cell = f"{case.model}/{case.format} on {place(case)}"
        what = case.phase if case.test == "test_repeat" else "restart"
        grids = []
        for index, one in enumerate(seen):
            text = f"prompt {one['prompt']}, {one['phase']}: {one['differing']} of {one['runs']} runs differ"
            text += f", first at position {one['first']} of {one['positions']}"
            rows = [(str(label), str(row)) for label, row in one["rows"]]
            grids.append((text, svg.grid(f"noise-{number}-{index}", f"{cell}, {text}", rows, one["positions"], one["span"])))
        found.append(Noisy(cell, what, known, case.text("first_divergent_layer"), case.text("bundle"), grids))
    return found
