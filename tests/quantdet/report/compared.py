"""Formats that were compared on one hardware: their pairs in both directions, and figures over these."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantdet.judging.verdicts import Pair, Verdict
from quantdet.report.case import Case, Place
from quantdet.report.text_layout import nats, unique_pairs

LIMIT = 8  # formats of a matrix on the screen
_BACK = {"prefill_published": "prefill_published_back", "decode_published": "decode_published_back"}
# Phase -> (name, field of a pair), the published metric first.
METRICS = {
    "prefill": (("published", "prefill_published"), ("own L2", "l2")),
    "decode": (("published", "decode_published"), ("own L2", "decode_l2")),
}


@dataclass(frozen=True)
class Spread:
    """Figures over the directed pairs of a place that were compared: the mean is over the finite ones.

    `absent`: those without a figure, which are in nothing else.
    """

    pairs: int
    infinite: int
    absent: int
    mean: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        known = [value for value in values if value is not None]
        finite = [value for value in known if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else None
        low, high = min(finite, default=None), max(finite, default=None)
        return cls(len(values), len(known) - len(finite), len(values) - len(known), mean, low, high)

    def __str__(self) -> str:
        if self.absent == self.pairs:
            return "no figure of any pair"
        absent = f"; {self.absent} of {self.pairs} pairs have no figure" if self.absent else ""
        if self.mean is None:
            return f"off-diagonal mean n/a (no pair is finite){absent}"
        of = f" over the {self.pairs - self.infinite - self.absent} finite" if self.infinite or self.absent else ""
        return f"off-diagonal mean {nats(self.mean)}{of}, range [{nats(self.low)}, {nats(self.high)}]{absent}"


@dataclass(frozen=True)
class Compared:
    """The compared formats of one model on one hardware (and vLLM version), and their pairs in both directions."""

    where: Place
    formats: list[str]
    pairs: dict[tuple[str, str], Pair]

    def value(self, field: str, a: str, b: str) -> float | None:
        """A pair's figure from `a` to `b`; None if there is none, or they were not compared. `l2` is that of prefill."""
        pair = self.pairs.get((a, b)) or self.pairs.get((b, a))
        if pair is None or (field == "l2" and pair.basis != "prefill"):
            return None
        value: float | None = getattr(pair, field if pair.a == a else _BACK.get(field, field))
        return value

    def spread(self, field: str) -> Spread:
        return Spread.of([self.value(field, *ids) for pair in self.pairs for ids in (pair, pair[::-1])])

    def told(self, field: str) -> bool:
        """Whether any pair has the figure."""
        found = self.spread(field)
        return found.absent < found.pairs

    def complete(self) -> bool:
        return 2 * len(self.pairs) == len(self.formats) * (len(self.formats) - 1)

    def untold(self) -> int:
        """Pairs that are neither the same nor distinct, as far as was seen."""
        return sum(pair.verdict is Verdict.INDISTINCT for pair in self.pairs.values())

    def identical(self) -> list[tuple[str, str]]:
        return [ids for ids, pair in self.pairs.items() if pair.verdict is Verdict.IDENTICAL]


def places(cases: Iterable[Case], order: Sequence[str] = ()) -> list[Compared]:
    """The places of the records; formats in the matrix's order."""
    found: dict[Place, dict[tuple[str, str], Pair]] = {}
    cases = list(cases)
    for case in cases:
        if case.pairs:
            found[case.place] = {}
    for where, pair in unique_pairs(cases):
        found[where][pair.a, pair.b] = pair
    rank = {name: index for index, name in enumerate(order)}
    made = []
    for where, pairs in sorted(found.items()):  # tests arrive in any order from several workers
        judged = {case.format for case in cases if case.pairs and case.place == where}
        names = list(dict.fromkeys(name for ids in sorted(pairs) for name in ids))
        if len(names) > LIMIT >= len(judged) > 1:  # selected, as the text says that shows a matrix: without the others
            pairs = {ids: pair for ids, pair in pairs.items() if judged.issuperset(ids)}
            names = [name for name in names if name in judged]
        made.append(Compared(where, sorted(names, key=lambda name: rank.get(name, len(rank))), pairs))
    return made
