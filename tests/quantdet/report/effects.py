"""Formats against formats on one hardware, in the shape of the published tables; rendering only, from the tests' records.

Two metrics stand side by side. *published*: over the top-k ids of the row's format, ids that the column's format does not
report dropped; it has a direction, so its matrix is not symmetric. *own*: the suite's, over the union of ids, censored.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantdet.classes import equivalence_classes, intransitive
from quantdet.report.tables import Case, joined, matrix, nats, one_line, place, prose, render, table, unique_pairs

LIMIT = 8  # formats of a matrix on the screen
_CLOSEST = 10
_BACK = {"prefill_published": "prefill_published_back", "decode_published": "decode_published_back"}
# Phase -> (name, field of a pair), the published metric first.
METRICS = {
    "prefill": (("published", "prefill_published"), ("own L2", "l2")),
    "decode": (("published", "decode_published"), ("own L2", "decode_l2")),
}
LEGEND = (
    "Distances in nats, row against column. published: the published metric, over the top-k ids of the row's format, "
    "ids missing in the column's dropped, mean over positions. own L2: this suite's metric, over the union of both "
    "top-k, missing ids censored. PREFILL: the same forced tokens, content positions. DECODE: each format's own tokens; "
    "published is inf where they part, own L2 is over the steps with a common context."
)


@dataclass(frozen=True)
class Spread:
    """Figures over the directed pairs of a place: the mean is over the finite ones."""

    pairs: int
    infinite: int
    mean: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        finite = [value for value in values if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else None
        return cls(len(values), len(values) - len(finite), mean, min(finite, default=None), max(finite, default=None))

    def __str__(self) -> str:
        if self.mean is None:
            return "off-diagonal mean n/a (no pair is finite)"
        of = f" over the {self.pairs - self.infinite} finite" if self.infinite else ""
        return f"off-diagonal mean {nats(self.mean)}{of}, range [{nats(self.low)}, {nats(self.high)}]"


@dataclass(frozen=True)
class Place:
    """The compared formats of one model on one hardware (and vLLM version), and their pairs in both directions."""

    where: str
    formats: list[str]
    pairs: dict[tuple[str, str], dict[str, Any]]

    def value(self, field: str, a: str, b: str) -> float | None:
        """A pair's figure from `a` to `b`; None if they were not compared."""
        pair = self.pairs.get((a, b)) or self.pairs.get((b, a))
        if pair is None:
            return None
        return float(pair[field if pair["a"] == a else _BACK.get(field, field)])

    def spread(self, field: str) -> Spread:
        values = (self.value(field, a, b) for a in self.formats for b in self.formats if a != b)
        return Spread.of([value for value in values if value is not None])

    def complete(self) -> bool:
        return 2 * len(self.pairs) == len(self.formats) * (len(self.formats) - 1)

    def identical(self) -> list[tuple[str, str]]:
        return [ids for ids, pair in self.pairs.items() if pair["verdict"] == "IDENTICAL"]


def places(cases: Iterable[Case], order: Sequence[str] = ()) -> list[Place]:
    """The places of the records; formats in the matrix's order."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    cases = list(cases)
    for case in cases:
        if case["pairs"]:
            found[place(case["properties"])] = {}
    for where, pair in unique_pairs(cases):
        found[where][pair["a"], pair["b"]] = pair
    rank = {name: index for index, name in enumerate(order)}
    made = []
    for where, pairs in sorted(found.items()):  # tests arrive in any order from several workers
        judged = {
            str(case["properties"]["case.format"]) for case in cases if case["pairs"] and place(case["properties"]) == where
        }
        names = list(dict.fromkeys(name for ids in sorted(pairs) for name in ids))
        if len(names) > LIMIT >= len(judged) > 1:  # selected, as the text says that shows a matrix: without the others
            pairs = {ids: pair for ids, pair in pairs.items() if judged.issuperset(ids)}
            names = [name for name in names if name in judged]
        made.append(Place(where, sorted(names, key=lambda name: rank.get(name, len(rank))), pairs))
    return made


def within_hardware(cases: Iterable[Case], order: Sequence[str], width: int) -> list[str]:
    """The texts of WITHIN-HARDWARE QUANTIZATION EFFECTS, both phases of every place, with the classes."""
    found = places(cases, order)
    texts = [prose(LEGEND, width)] if found else []
    for one in found:
        for phase in METRICS:
            texts += _phase(one, phase, width)
        texts += classes(one, width)
    return texts


def _phase(one: Place, phase: str, width: int) -> list[str]:
    texts = [prose(f"WITHIN-HARDWARE QUANTIZATION EFFECTS ({phase.upper()}): {one.where}", width)]
    for name, field in METRICS[phase]:
        if len(one.formats) <= LIMIT:

            def cell(a: str, b: str, field: str = field) -> str:
                return "-" if a == b else nats(one.value(field, a, b))

            texts += matrix(name, one.formats, one.formats, cell, width)
        spread = one.spread(field)
        text = f"{name}: {spread}"
        if spread.infinite:
            parted = [
                float(pair["l2"]) for (a, b), pair in one.pairs.items()
                if math.inf in (one.value(field, a, b), one.value(field, b, a))
            ]  # fmt: skip
            why = "tokens part" if phase == "decode" else "no id in common"
            text += f"; {spread.infinite} of {spread.pairs} pairs inf ({why})"
            if phase == "decode":
                text += f", on the same forced tokens their own L2 is {nats(min(parted))} to {nats(max(parted))}"
        texts.append(prose(text, width))
    if len(one.formats) > LIMIT:
        model = one.where.partition(" on ")[0]
        a, b = one.formats[:2]
        texts.append(
            prose(
                f"{len(one.formats)} formats: a matrix is shown for up to {LIMIT}, as with -k '{model} and ({a} or {b})'; "
                f"the full one is in the JUnit properties (effects.{phase}, pair.FORMAT)",
                width,
            )
        )
    return texts


def classes(one: Place, width: int) -> list[str]:
    """Formats that are the same numerics: every logit equal, prefill and decode."""
    same = one.identical()
    if not one.complete():  # a part of the matrix: classes would claim the rest
        known = "; ".join(f"{a} = {b}" for a, b in same) or "none"
        return [prose(f"kernel equivalence classes, {one.where}: {known} (of {len(one.pairs)} compared pairs)", width)]
    groups = equivalence_classes(one.formats, same)
    several = "; ".join(" = ".join(group) for group in groups if len(group) > 1) or "none"
    tail = f"({len(groups)} classes of {len(one.formats)} formats)"
    texts = [prose(f"kernel equivalence classes, {one.where}: {several} {tail}", width)]
    for a, b, c in intransitive(one.formats, same):
        texts.append(prose(f"  not transitive: {a} = {b}, {b} = {c}, but not {a} = {c}", width))
    return texts


def comparison_results(cases: Iterable[Case], width: int) -> list[str]:
    """LOGPROB COMPARISON RESULTS: identical pairs and the others, of each the closest first."""
    rows = unique_pairs(cases)
    if not rows:
        return []
    identical = [row for row in rows if row[1]["verdict"] == "IDENTICAL"]
    others = [row for row in rows if row[1]["verdict"] != "IDENTICAL"]
    labels = _labels([where for where, _ in rows])
    made = table("model", "pair", "verdict", "L2", "published", "max", "positions", fold=("model", "pair"))
    for where, pair in (*identical[:_CLOSEST], *others[:_CLOSEST]):
        made.add_row(
            labels[where], joined(pair["a"], "|", pair["b"], width - 64), pair["verdict"], f"{pair['l2']:.3g}",
            f"{pair['prefill_published']:.3g}", f"{pair['max_abs']:.3g}", f"{pair['differing']}/{pair['positions']}",
        )  # fmt: skip
    indistinct = sum(pair["verdict"] == "INDISTINCT" for _, pair in others)
    title = f"LOGPROB COMPARISON RESULTS: {len(identical)} identical pairs, {len(others) - indistinct} different"
    title += f", {indistinct} within repeat noise" if indistinct else ""
    cut = len(identical) > _CLOSEST or len(others) > _CLOSEST
    legend = (
        f"closest first{f', {_CLOSEST} of each' if cut else ''}; L2: own metric; published: prefill metric, first to second; "
        "max: largest difference of a logprob; positions: with other logits, of all"
    )
    return [prose(title, width), prose(f"({legend})", width), render(made, width)]


def _labels(wheres: Sequence[str]) -> dict[str, str]:
    """The model's name, with hardware and version where it was measured in several places."""
    models = [where.partition(" on ")[0] for where in dict.fromkeys(wheres)]
    return {
        where: model if models.count(model) == 1 else where.replace(" on ", " ").replace(", vLLM", "")
        for where, model in zip(dict.fromkeys(wheres), models, strict=True)
    }


def properties(cases: Iterable[Case], order: Sequence[str] = ()) -> list[tuple[str, str]]:
    """`effects.prefill` and `effects.decode`, one line of JSON each; a matrix's rows are first formats."""
    found = places(cases, order)
    if not found:
        return []
    return [(f"effects.{phase}", one_line({one.where: _figures(one, phase) for one in found})) for phase in METRICS]


def _figures(one: Place, phase: str) -> dict[str, Any]:
    figures: dict[str, Any] = {"formats": one.formats}
    for name, field in METRICS[phase]:
        spread = one.spread(field)
        figures[name.replace(" ", "_").lower()] = {
            **vars(spread),
            "matrix": [[None if a == b else one.value(field, a, b) for b in one.formats] for a in one.formats],
        }
    figures["classes"] = equivalence_classes(one.formats, one.identical()) if one.complete() else None
    return figures
