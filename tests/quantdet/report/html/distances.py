"""Heat maps of pairs of formats, and what several machines or versions have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantdet.judging.verdicts import Verdict
from quantdet.metrics.classes import equivalence_classes
from quantdet.report import compared, printed
from quantdet.report.case import Case
from quantdet.report.compared import Compared
from quantdet.report.html import svg
from quantdet.report.html.verdicts import Column, Tag, place, short, tag
from quantdet.report.text_layout import nats

# (name, field of a pair, what it is)
MAPS = (
    ("Forced", "l2", "own L2, the same forced tokens, union of top-k ids"),
    ("Prefill", "prefill_published", "published metric, the same forced tokens, top-k of the row's format"),
    ("Decode", "decode_published", "published metric, each format's own tokens, inf where they part"),
)
_OWN = ("Common steps", "decode_l2", "own L2, each format's own tokens while they are the same, union of top-k ids")


@dataclass(frozen=True)
class Map:
    name: str
    about: str
    picture: Markup
    figures: list[list[str]]
    spread: str


@dataclass(frozen=True)
class Heat:
    """The maps of one place; formats in the order of the pictures."""

    where: str
    formats: list[str]
    classes: list[tuple[str, ...]]
    maps: list[Map]
    complete: bool
    untold: int
    steps: list[tuple[str, list[list[str]]]]  # by reference, step by step
    tokens: list[tuple[str, str, str, str, str]]
    absent: list[str]  # what has no map, since no pair has a figure of it


def heat(cases: Sequence[Case], order: Sequence[str]) -> tuple[list[Heat], svg.Scale]:
    """Every place where formats were compared, and the scale of all maps."""
    places = compared.places(cases, order)
    scale = svg.Scale.of(
        one.value(field, a, b)
        for one in places
        for _, field, _ in _maps(one)
        for a, b in [*one.pairs, *(i[::-1] for i in one.pairs)]
    )
    made = []
    for number, one in enumerate(places):
        groups = equivalence_classes(one.formats, one.identical())
        formats = [name for group in groups for name in group]
        maps = []
        for name, field, about in _maps(one):

            def value(a: str, b: str, one: Compared = one, field: str = field) -> float | None:
                return one.value(field, a, b)

            title = f"{name} distances, {one.where} ({about})"
            picture = svg.heat_map(f"heat-{number}-{name.lower()}", title, formats, value, scale, groups)
            maps.append(Map(name, about, picture, _figures(formats, value), str(one.spread(field))))
        absent = [f"{name} ({about})" for name, field, about in MAPS if not one.told(field)]
        several = [group for group in groups if len(group) > 1]
        made.append(
            Heat(
                str(one.where),
                formats,
                several,
                maps,
                one.complete(),
                one.untold(),
                _steps(one, formats),
                printed.tokens(one),
                absent,
            )
        )
    return made, scale


def _maps(one: Compared) -> list[tuple[str, str, str]]:
    """What pairs have figures of; the suite's own metric on common steps in place of that on forced tokens."""
    found = [row for row in MAPS if one.told(row[1])]
    return found if one.told("l2") or not one.told(_OWN[1]) else [*found, _OWN]


def _figures(formats: list[str], value: svg.Value) -> list[list[str]]:
    return [["\N{EN DASH}" if a == b else nats(value(a, b)) for b in formats] for a in formats]


def _steps(one: Compared, formats: list[str]) -> list[tuple[str, list[list[str]]]]:
    """The matrix of each reference whose decode has a figure step by step of every pair."""
    made = []
    for id_ in printed.whole(one):

        def value(a: str, b: str, id_: str = id_) -> float | None:
            return printed.reference(one, id_, "steps", a, b)

        made.append((id_, _figures(formats, value)))
    return made


@dataclass(frozen=True)
class Equal:
    """Which (format, place) of a model gave the same logits: a row is a class, a column a place."""

    model: str
    places: list[Column]
    classes: list[list[list[str]]]
    everywhere: int
    compared: int
    apart: list[str]
    others: list[str]


def equal(cases: Sequence[Case]) -> list[Equal]:
    """Models that were measured at two places or more."""
    shas: dict[str, dict[tuple[str, Column], dict[str, str]]] = {}
    weights: dict[tuple[str, str], set[str]] = {}
    noisy: set[tuple[str, str, Column]] = set()
    for case in cases:
        sha = case.text("logits.sha256")
        if case.test != "test_repeat" or not sha:
            continue
        where = place(case)
        shas.setdefault(case.model, {}).setdefault((case.format, where), {})[case.phase] = sha
        weights.setdefault((case.model, case.format), set()).add(case.text("checkpoint.sha256"))
        if case.verdict is Verdict.NOISY:
            noisy.add((case.model, case.format, where))
    made = []
    for model, known in shas.items():
        places = list(dict.fromkeys(where for _, where in known))
        if len(places) < 2:
            continue
        classes: dict[tuple[str, str], dict[Column, list[str]]] = {}
        for (format_, where), phases in known.items():
            key = (phases.get("decode", ""), phases.get("prefill", ""))
            mark = "~" if (model, format_, where) in noisy else ""
            classes.setdefault(key, {}).setdefault(where, []).append(format_ + mark)
        formats: dict[str, set[tuple[str, str]]] = {}
        counts: dict[str, int] = {}
        for (format_, _), phases in known.items():
            formats.setdefault(format_, set()).add((phases.get("decode", ""), phases.get("prefill", "")))
            counts[format_] = counts.get(format_, 0) + 1
        several = [name for name in formats if counts[name] > 1]
        rows = [[row.get(where, []) for where in places] for row in classes.values() if sum(map(len, row.values())) > 1]
        made.append(
            Equal(
                model,
                places,
                sorted(rows, key=lambda row: -sum(map(bool, row))),
                sum(len(formats[name]) == 1 for name in several),
                len(several),
                [name for name in several if len(formats[name]) > 1],
                [name for name in several if len(weights[model, name]) > 1],
            )
        )
    return made


def drift(cases: Sequence[Case]) -> list[tuple[str, str, Tag, list[tuple[str, str]], str, str]]:
    """Format against itself in several vLLM versions: cell, hardware, verdict, kernels by version, L2, expectation.

    What is not identical comes first.
    """
    found = []
    for case in cases:
        known = tag(case)
        if case.test == "test_versions" and known is not None:
            executed = [(version, short(case.text(f"kernel.executed@{version}"))) for version in case.names("versions")]
            distance = case.number("l2")
            l2 = "" if distance is None else f"{distance:.3g}"
            found.append((f"{case.model}/{case.format}", case.hardware, known, executed, l2, case.expectation))
    return sorted(found, key=lambda row: row[2].word == "IDENTICAL")
