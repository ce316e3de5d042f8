"""Formats against formats on one hardware, in the shape of the published tables; rendering only, from the tests' records.

Two metrics stand side by side. *published*: over the top-k ids of the row's format, ids that the column's format does not
report dropped; it has a direction, so its matrix is not symmetric. *own*: the suite's, over the union of ids, censored.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from quantdet.judging.verdicts import Verdict
from quantdet.metrics.classes import equivalence_classes, intransitive
from quantdet.report import printed
from quantdet.report.case import Case, Place
from quantdet.report.compared import LIMIT, METRICS, Compared, places
from quantdet.report.text_layout import joined, matrix, nats, one_line, prose, render, table, unique_pairs

_CLOSEST = 10
_LACKING = {
    ("prefill", "prefill_published"): "no logprobs of prefill were reported of two formats",
    ("prefill", "l2"): "no logprobs of prefill were reported of two formats",
    ("decode", "decode_published"): "no logprobs of the same tokens were reported of two formats",
    ("decode", "decode_l2"): "no step after the same tokens was reported of two formats",
}
LEGEND = (
    "Distances in nats, row against column. published: the published metric, over the top-k ids of the row's format, "
    "ids missing in the column's dropped, mean over positions. own L2: this suite's metric, over the union of both "
    "top-k, missing ids censored. PREFILL: the same forced tokens, content positions. DECODE: each format's own tokens; "
    "published is inf where they part, own L2 is over the steps with a common context. Blank: no figure."
)


def within_hardware(cases: Iterable[Case], order: Sequence[str], width: int) -> list[str]:
    """The texts of WITHIN-HARDWARE QUANTIZATION EFFECTS, both phases of every place, with the classes."""
    found = places(cases, order)
    texts = [prose(LEGEND, width)] if found else []
    for one in found:
        for phase in METRICS:
            texts += _phase(one, phase, width)
        texts += [*printed.steps(one, width), *printed.generated(one, width), *classes(one, width)]
    return texts


def _phase(one: Compared, phase: str, width: int) -> list[str]:
    title = f"WITHIN-HARDWARE QUANTIZATION EFFECTS ({phase.upper()}): {one.where}"
    if not any(one.told(field) for _, field in METRICS[phase]):
        return [prose(f"{title}: no figure, nothing of {phase} was reported of two formats", width)]
    texts = [prose(title, width)]
    for name, field in METRICS[phase]:
        if not one.told(field):
            texts.append(prose(f"{name}: no figure, {_LACKING[phase, field]}", width))
            continue
        if len(one.formats) <= LIMIT:

            def cell(a: str, b: str, field: str = field) -> str:
                return "-" if a == b else nats(one.value(field, a, b))

            texts += matrix(name, one.formats, one.formats, cell, width)
        spread = one.spread(field)
        text = f"{name}: {spread}"
        if spread.infinite:
            parted = [
                one.value("l2", a, b) for a, b in one.pairs if math.inf in (one.value(field, a, b), one.value(field, b, a))
            ]
            forced = [value for value in parted if value is not None]
            why = "tokens part" if phase == "decode" else "no id in common"
            text += f"; {spread.infinite} of {spread.pairs} pairs inf ({why})"
            if phase == "decode" and forced and len(forced) == len(parted):
                text += f", on the same forced tokens their own L2 is {nats(min(forced))} to {nats(max(forced))}"
        texts.append(prose(text, width))
    if len(one.formats) > LIMIT:
        a, b = one.formats[:2]
        texts.append(
            prose(
                f"{len(one.formats)} formats: a matrix is shown for up to {LIMIT}, as with "
                f"-k '{one.where.model} and ({a} or {b})'; "
                f"the full one is in the JUnit properties (effects.{phase}, pair.FORMAT)",
                width,
            )
        )
    return texts


def classes(one: Compared, width: int) -> list[str]:
    """Formats that are the same numerics: every logit equal, prefill and decode."""
    same = one.identical()
    if not one.complete():  # a part of the matrix: classes would claim the rest
        known = "; ".join(f"{a} = {b}" for a, b in same) or "none"
        return [prose(f"kernel equivalence classes, {one.where}: {known} (of {len(one.pairs)} compared pairs)", width)]
    groups = equivalence_classes(one.formats, same)
    several = "; ".join(" = ".join(group) for group in groups if len(group) > 1) or "none"
    untold = one.untold()  # may be the same or not: so many classes at most
    tail = f"({len(groups)} classes of {len(one.formats)} formats"
    tail += f" at most: {untold} pair{'s' if untold > 1 else ''} not told apart)" if untold else ")"
    texts = [prose(f"kernel equivalence classes, {one.where}: {several} {tail}", width)]
    for a, b, c in intransitive(one.formats, same):
        texts.append(prose(f"  not transitive: {a} = {b}, {b} = {c}, but not {a} = {c}", width))
    return texts


def comparison_results(cases: Iterable[Case], width: int) -> list[str]:
    """LOGPROB COMPARISON RESULTS: identical pairs and the others, of each the closest first."""
    rows = unique_pairs(cases)
    if not rows:
        return []
    identical = [row for row in rows if row[1].verdict is Verdict.IDENTICAL]
    others = [row for row in rows if row[1].verdict is not Verdict.IDENTICAL]
    labels = _labels(where for where, _ in rows)
    made = table("model", "pair", "verdict", "L2", "published", "max", "positions", fold=("model", "pair"))
    for where, pair in (*identical[:_CLOSEST], *others[:_CLOSEST]):
        made.add_row(
            labels[where], joined(pair.a, "|", pair.b, width - 64), pair.verdict,
            *map(_shown, (pair.l2, pair.prefill_published, pair.max_abs)),
            f"{pair.differing}/{pair.positions}",
        )  # fmt: skip
    indistinct = [pair for _, pair in others if pair.verdict is Verdict.INDISTINCT]
    title = f"LOGPROB COMPARISON RESULTS: {len(identical)} identical pairs, {len(others) - len(indistinct)} different"
    if indistinct:  # of one run each nobody knows the noise
        known = all(pair.within is not None for pair in indistinct)
        title += f", {len(indistinct)} {'within repeat noise' if known else 'not told apart'}"
    cut = len(identical) > _CLOSEST or len(others) > _CLOSEST
    legend = (
        f"closest first{f', {_CLOSEST} of each' if cut else ''}; L2: own metric; published: prefill metric, first to second; "
        "max: largest difference of a logprob; positions: with other logits, of all"
    )
    if any(pair.basis == "decode" for _, pair in rows):
        legend += "; of decode, tokens in common, where no prefill was reported"
    if any(pair.prefill_published is None for _, pair in rows):
        legend += "; - : no figure"
    return [prose(title, width), prose(f"({legend})", width), render(made, width)]


def checkpoints_apart(cases: Iterable[Case], width: int) -> list[str]:
    """What the numbers of two checkpoints differ in, and whether the same kernels ran: each pair once, with its distance."""
    told: list[str] = []
    seen: set[frozenset[str]] = set()
    for case in cases:
        distances = {pair.b: pair.l2 for pair in case.pairs}
        for name in case.figures:
            other = name.removeprefix("apart.")
            if other == name or (both := frozenset({case.format, other})) in seen:
                continue
            seen.add(both)
            l2 = distances.get(other)
            size = "" if l2 is None else f"{nats(l2)} nats (own L2, prefill); "
            told.append(prose(f"{case.format} | {other}: {size}{case.text(name)}", width))
    return told


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _labels(places_: Iterable[Place]) -> dict[Place, str]:
    """The model's name, with hardware and version where it was measured in several places."""
    known = list(dict.fromkeys(places_))
    models = Counter(one.model for one in known)
    return {
        one: one.model if models[one.model] == 1 else " ".join(filter(None, (one.model, one.hardware, one.vllm)))
        for one in known
    }


def properties(cases: Iterable[Case], order: Sequence[str] = ()) -> list[tuple[str, str]]:
    """`effects.prefill` and `effects.decode`, one line of JSON each; a matrix's rows are first formats."""
    found = places(cases, order)
    if not found:
        return []
    made = [(f"effects.{phase}", one_line({str(one.where): _figures(one, phase) for one in found})) for phase in METRICS]
    return made + printed.properties(found)


def _figures(one: Compared, phase: str) -> dict[str, Any]:
    figures: dict[str, Any] = {"formats": one.formats}
    for name, field in METRICS[phase]:
        spread = one.spread(field)
        figures[name.replace(" ", "_").lower()] = {
            **vars(spread),
            "matrix": [[None if a == b else one.value(field, a, b) for b in one.formats] for a in one.formats],
        }
    figures["classes"] = equivalence_classes(one.formats, one.identical()) if one.complete() else None
    return figures
